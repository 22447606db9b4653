"""Short versions of the programs beside this file."""

from __future__ import annotations

import pytest

from tests.serving.load.drain import CLIENTS, drain
from tests.serving.load.overload import LIMITS, TICK, overload
from tests.serving.load.server_process import server_process
from tests.serving.load.slowloris import TICK as SLOW_TICK
from tests.serving.load.slowloris import compare
from tests.serving.load.storm import storm

pytestmark = pytest.mark.slow


def test_storm_of_mixed_clients() -> None:
    with server_process(max_batch_size=32, max_queue=128, max_concurrency=128) as server:
        tally = storm(server, seconds=8, clients=64)
        assert tally.wrong == [] and tally.failures == 0
        assert set(tally.statuses) <= {200, 400, 404, 429} and tally.statuses[200] > 100
        assert server.leaks() == {}


def test_overload_is_refused_quickly_and_leaves_nothing() -> None:
    with server_process(TICK, **LIMITS) as server:
        # A machine that is busy with other things may spoil one try, not three.
        for _ in range(3):
            found = overload(server, seconds=3)
            assert found.other == [] and found.without_hint == 0
            assert len(found.refused) > 300 and len(found.answered) > 10
            assert found.recovery <= 5.0
            if found.refusal_p99 <= 0.05:
                break
        assert found.refusal_p99 <= 0.05
        assert server.leaks() == {}


def test_slow_sockets_do_not_hurt_others() -> None:
    with server_process(SLOW_TICK, max_batch_size=8, read_timeout=30.0) as server:
        ratios = []
        for _ in range(4):
            found = compare(server, seconds=8, rounds=4)
            assert found.statuses == {200}
            ratios.append(found.ratio)
            if found.ratio <= 1.2:
                break
        assert min(ratios) <= 1.2, ratios


def test_a_drain_cuts_nobody_off() -> None:
    for _ in range(3):
        found = drain()
        assert (found.whole, found.code, found.late) == (CLIENTS, 0, 503)
        assert found.seconds < 25 and found.complaints == ""
