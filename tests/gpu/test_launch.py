"""Ranks on GPUs: NCCL between them, and the same care when one fails."""

from __future__ import annotations

import time

import pytest
import torch

from mtk.errors import LayoutError, WorkerError
from mtk.launch.local import launch
from tests.parallel import jobs

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@two_gpus
def test_ranks_add_up_over_nccl() -> None:
    torch.zeros(1, device="cuda")  # the launcher may use CUDA itself
    assert launch(jobs.add_up, (60.0,), 2, device="cuda", timeout=60.0)["total"] == 3


@two_gpus
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raise", r"\Arank 1 failed:[^$]*the seventh brick is loose"),
        ("kill", r"\Arank 1 was killed by SIGKILL"),
        ("stop", r"\Arank 1 [^$]*last seen in 'data.next' \d+ s ago and is stopped"),
        ("loop", r"\Arank 1 [^$]*last seen in 'data.next' [^$]*in fail\n"),
    ],
)
def test_a_rank_that_fails(how: str, words: str) -> None:
    started = time.monotonic()
    with pytest.raises(WorkerError, match=words):
        launch(jobs.misbehave, (10.0, "1", how), 2, device="cuda", timeout=10.0)
    assert time.monotonic() - started < 60


def test_more_ranks_than_gpus() -> None:
    with pytest.raises(LayoutError, match="need a GPU each"):
        launch(jobs.add_up, (1.0,), torch.cuda.device_count() + 1, device="cuda")
