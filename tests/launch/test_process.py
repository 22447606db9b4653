"""A rank's place from every kind of environment, and how ranks meet."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from mtk.errors import LayoutError, WorkerError
from mtk.launch.process import Place, find_place, join
from mtk.launch.slurm import first_host, tasks_on_node
from mtk.launch.stores import connect, loopback_store, meet
from mtk.parallel.groups import NoTrace

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "12",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "4711",
    "SLURM_TASKS_PER_NODE": "4(x2),4",
    "SLURM_NODELIST": "gpu[003-004,9]",
}
SLURM_PORT = 12000 + 4711 * 7 % 16000
OWN = {"MTK_RANK": "1", "MTK_WORLD_SIZE": "2", "MTK_STORE": "127.0.0.1:4000", "MTK_TRACE": "t"}


def place(*values: Any) -> Place:
    rank, world, local_rank, local_world, started_by, *address = values
    cpu = torch.device("cpu")
    return Place(rank, world, local_rank, local_world, cpu, started_by, *address)


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, Place()),
        ({"MASTER_ADDR": "n1", "SLURM_NTASKS": "8"}, Place()),
        (TORCHRUN, place(5, 8, 1, 4, "torchrun", ("n1", 29500))),
        ({**SLURM, **TORCHRUN}, place(5, 8, 1, 4, "torchrun", ("n1", 29500))),
        ({**TORCHRUN, "MASTER_ADDR": "fd00::1"}, place(5, 8, 1, 4, "torchrun", ("fd00::1", 29500))),
        (SLURM, place(9, 12, 1, 4, "slurm", ("gpu003", SLURM_PORT))),
        ({**SLURM, "MASTER_ADDR": "head"}, place(9, 12, 1, 4, "slurm", ("head", SLURM_PORT))),
        ({**SLURM, "MASTER_PORT": "77"}, place(9, 12, 1, 4, "slurm", ("gpu003", 77))),
        ({**TORCHRUN, **OWN}, place(1, 2, 1, 2, "mtk", ("127.0.0.1", 4000), "t")),
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"},
            place(0, 1, 0, 1, "slurm"),
        ),
    ],
)
def test_places(environment: dict[str, str], found: Place) -> None:
    assert find_place("cpu", environment) == found


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {name: text for name, text in environment.items() if name not in names}


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (without(TORCHRUN, "WORLD_SIZE", "LOCAL_RANK"), "WORLD_SIZE is not set; LOCAL_RANK is not"),
        ({"WORLD_SIZE": "4"}, "RANK is not set"),
        ({**TORCHRUN, "RANK": "one"}, "RANK = 'one'"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK = '-1'"),
        ({**TORCHRUN, "RANK": "8"}, "rank 8 of 8"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "local rank 4 of 4"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "9"}, "local rank 1 of 9"),
        (without(TORCHRUN, "MASTER_PORT"), "MASTER_PORT must be set"),
        ({**TORCHRUN, "MASTER_PORT": "99999"}, "no address"),
        (without(SLURM, "SLURM_STEP_ID"), "not started by srun"),
        (without(SLURM, "SLURM_LOCALID"), "SLURM_LOCALID is not set"),
        (without(SLURM, "SLURM_NODELIST"), "no SLURM_NODELIST"),
        ({**SLURM, "SLURM_NODEID": "3"}, "no node number 3"),
        ({**SLURM, "SLURM_TASKS_PER_NODE": "four"}, "no list of task counts"),
        ({**SLURM, "MASTER_PORT": "x"}, "must be a port"),
        (without(OWN, "MTK_WORLD_SIZE"), "MTK_WORLD_SIZE is not set"),
        (without(OWN, "MTK_STORE"), "no address"),
    ],
)
def test_environments_that_make_no_sense(environment: dict[str, str], words: str) -> None:
    with pytest.raises(LayoutError) as caught:
        find_place("cpu", environment)
    assert words in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_gpu_for_every_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert find_place("cuda", TORCHRUN).device == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(LayoutError, match="4 ranks on this machine need a GPU each"):
        find_place("cuda", TORCHRUN)
    bound = find_place("cuda", {**SLURM, "SLURM_GPUS_PER_TASK": "1"})
    assert bound.device == torch.device("cuda", 0)
    with pytest.raises(LayoutError, match="torch sees 1"):
        find_place("cuda", SLURM)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[003-007,9],login", "gpu003"),
        ("rack[2-3]node[08,10]-ib,x", "rack2node08-ib"),
        ("", ""),
    ],
)
def test_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_tasks_on_node() -> None:
    assert [tasks_on_node("8(x2),4", node) for node in range(3)] == [8, 8, 4]


def test_one_process_makes_no_group() -> None:
    with join(Place(), 1.0) as trace:
        assert isinstance(trace, NoTrace)
        assert not torch.distributed.is_initialized()


def test_nobody_at_the_address() -> None:
    alone = place(1, 2, 0, 1, "torchrun", ("127.0.0.1", 9))
    words = r"rank 1 could not meet the 1 others at 127.0.0.1:9: .*--distributed-timeout-minutes"
    with pytest.raises(WorkerError, match=words), join(alone, 1.0):
        pass


def test_ranks_that_do_not_come_are_named() -> None:
    server = loopback_store(3, 5.0)
    with pytest.raises(TimeoutError, match="2 of 3 ranks did not come: 1, 2"):
        meet(connect(("127.0.0.1", server.port), 3, 5.0), 0, 3, 0.2)


def test_a_second_meeting_does_not_see_the_first() -> None:
    """As after a restart under torchrun, whose store keeps the words of dead ranks."""
    server = loopback_store(3, 5.0)
    first, second = (_meeting(server.port) for _ in range(2))
    assert len(set(first)) == len(set(second)) == 1
    assert first[0] != second[0]


def _meeting(port: int) -> list[str]:
    found = [""] * 3

    def come(rank: int) -> None:
        found[rank] = meet(connect(("127.0.0.1", port), 3, 5.0), rank, 3, 5.0)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
