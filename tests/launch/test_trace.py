"""The trace of a rank, and the sentence made of the traces of all."""

from __future__ import annotations

import timeit
from dataclasses import replace
from pathlib import Path

import pytest

from mtk.launch.beacon import Beacon
from mtk.launch.hang import RankState, explain, missing
from mtk.launch.stores import loopback_store
from mtk.launch.trace import Sight, TraceFile, private_trace

GROUPS = {0: (0, 1), 1: (0, 1), 2: (2, 3), 3: (2, 3)}


def waiting(rank: int, site: str = "tp.row", group: str = "tp", call: int = 812) -> RankState:
    seen = Sight(site, group, call, True, 60.0, "forward 3", 9, 70.0)
    return RankState(
        seen, {"tp": GROUPS[rank], "dp": (rank % 2, rank % 2 + 2), "world": (0, 1, 2, 3)}
    )


def away(rank: int, phase: str = "data.next", age: float = 61.0) -> RankState:
    return replace(waiting(rank), sight=Sight("tp.row", "tp", 811, False, 65.0, phase, 8, age))


def test_a_slot_is_read_by_others(tmp_path: Path) -> None:
    file = TraceFile.create(tmp_path / "trace", 3)
    empty = file.sight(1)
    assert empty == Sight(age=empty.age, phase_age=empty.phase_age)
    trace = TraceFile.open(tmp_path / "trace").trace(1)
    trace.know({"tp": (0, 1), "dp": (1,)})
    trace.phase("forward 3")
    for _ in range(2):
        trace.enter("tp.row", "tp")
        trace.leave()
    trace.enter("dp." + "x" * 100, "dp")
    seen = file.sight(1)
    assert (seen.group, seen.call, seen.inside) == ("dp", 1, True)
    assert len(seen.site) == 64
    assert (seen.phase, seen.phases) == ("forward 3", 1)
    trace.leave()
    trace.enter("tp.row", "tp")
    assert (file.sight(1).call, file.sight(1).site) == (3, "tp.row")
    assert 0 <= file.sight(1).age < 5
    assert file.groups(1) == {"tp": (0, 1), "dp": (1,)}
    assert file.groups(0) == {}
    assert file.sight(2).call == 0


def test_a_call_is_cheap() -> None:
    trace = private_trace()

    def call() -> None:
        trace.enter("tp.row", "tp")
        trace.leave()

    assert min(timeit.repeat(call, number=5000, repeat=5)) / 5000 < 4e-6


def test_the_missing_rank_is_named() -> None:
    states = {0: waiting(0), 1: waiting(1), 2: away(2), 3: waiting(3)}
    assert explain(states) == (
        "rank 2 never entered 'tp.row' (group tp: ranks 2, 3; call 812); it was last seen in "
        "'data.next' 61 s ago; rank 3 waited 60 s"
    )
    assert missing(states) == [2]


def test_ranks_that_wait_for_waiting_ranks_are_followed() -> None:
    states = {
        0: waiting(0, "dp.grad", "dp", 7),
        1: waiting(1),
        2: away(2),
        3: waiting(3, "loss", "world", 1),
    }
    assert missing(states) == [2]
    text = explain(states)
    assert text.startswith("rank 2 never entered 'dp.grad' (group dp: ranks 0, 2; call 7); ")
    assert text.endswith("ranks 0, 3 waited 60 s")


def test_ranks_that_disagree() -> None:
    states = {0: waiting(0), 1: waiting(1, "loss", "world", 1), 2: waiting(2), 3: waiting(3)}
    assert missing(states) == []
    text = explain(states)
    assert text.startswith("the ranks wait for each other: rank 0 in 'tp.row' (group tp, call 812)")
    assert "rank 1 in 'loss' (group world, call 1)" in text


def test_one_that_is_a_call_behind_in_the_same_site() -> None:
    states = {0: waiting(0), 1: waiting(1, call=811)}
    assert explain(states).startswith("the ranks wait for each other: ")


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (RankState(), "nothing is known of it"),
        (RankState(Sight()), "it has not entered any collective yet"),
        (replace(away(1), gone="has finished its work"), "; it has finished its work; "),
        (replace(waiting(1), gone="failed (ValueError)"), "; it failed (ValueError); "),
        (replace(away(1), note="is stopped (SIGSTOP)"), "61 s ago and is stopped (SIGSTOP); "),
        (away(1, age=66.0), "leaving 'tp.row' (group tp, call 811) in 'data.next' 65 s ago; "),
    ],
)
def test_what_is_known_of_the_missing_rank(state: RankState, words: str) -> None:
    text = explain({0: waiting(0), 1: state})
    assert text.startswith("rank 1 never entered 'tp.row' (group tp: ranks 0, 1; call 812); ")
    assert words in text


def test_everybody_is_there() -> None:
    assert "connection or a device hangs" in explain({0: waiting(0), 1: waiting(1)})


def test_outside_named_collectives_phases_tell() -> None:
    ahead = RankState(Sight(phase="backward 3", phases=9, phase_age=60.0))
    text = explain({0: ahead, 1: away(1), 2: ahead})
    assert text.startswith("rank 1 is behind: it was last seen in 'data.next' 61 s ago")
    assert text.endswith("ranks 0, 2 went on to 'backward 3'")
    assert missing({0: ahead, 1: away(1), 2: ahead}) == [1]
    called = RankState(Sight("tp.row", "tp", 7, False, 50.0))
    late = RankState(Sight("tp.row", "tp", 6, False, 55.0))
    assert explain({0: called, 1: late}) == (
        "rank 1 is behind: it was last seen leaving 'tp.row' (group tp, call 6) 55 s ago; "
        "rank 0 went on to 'tp.row' (group tp, call 7)"
    )
    assert explain({0: ahead, 1: ahead}).startswith("no rank is in a named collective; rank 0: ")
    assert explain({0: RankState()}) == ""


def test_many_ranks_are_only_counted() -> None:
    everyone = tuple(range(100))
    seen = Sight("loss", "world", 1, True, 60.0)
    states = {0: RankState(seen, {"world": everyone})} | {r: RankState() for r in everyone[1:]}
    text = explain(states)
    assert "and 91 more ranks" in text
    assert len(text) < 2000


def test_a_beacon_ends_a_collective_that_the_backend_does_not() -> None:
    """Rank 0 waits, rank 1 publishes that it does something else."""
    store = loopback_store(2, 5.0)
    said: list[str] = []
    traces = [private_trace(), private_trace()]
    for rank, trace in enumerate(traces):
        trace.know({"tp": (0, 1)})
        trace.phase(f"phase of {rank}")
    traces[0].enter("tp.row", "tp")
    with Beacon(1, 2, store, traces[1], 0.3), Beacon(0, 2, store, traces[0], 0.3, said.append) as b:
        b._thread.join(1.2)
    assert said[0].startswith(
        "rank 0 gave up after 1 s (--distributed-timeout-minutes): rank 1 never"
    )
    assert "last seen in 'phase of 1'" in said[0]
