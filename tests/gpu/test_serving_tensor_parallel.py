"""The engine on two GPUs gives what one gives, with graphs, kernels and steps launched ahead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mtk.config import make
from mtk.config.serve import ServeConfig
from mtk.launch.rank_server import RankServer
from serving.engine_process import EngineProcess
from serving.engine_workers import start_server
from serving.requests import GenerationRequest
from serving.sampling import SamplingParams
from stages.serve_process import open_process
from tests.convert.models import llama, save_native

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

SIZES = {"hidden_size": 256, "ffn_hidden_size": 512, "seq_length": 256}


@pytest.fixture(scope="module")
def server() -> Iterator[RankServer]:
    """Forks before anything here has touched CUDA, in a process that never does."""
    running = start_server("stages.serve_shared", 2)
    yield running
    running.close()


def answers(server: RankServer, path: Path, ranks: int, said: list[str], **cache: Any) -> Any:
    """Greedy and drawn tokens, many at once so that steps of several sizes run."""
    config = make(
        ServeConfig,
        load=str(path),
        device="cuda",
        tensor_model_parallel_size=ranks,
        limits={"max_batch_size": 8},
        cache={"kv_cache_tokens": 4096, **cache},
    )
    engine = open_process(config, server, said.append).engine
    assert isinstance(engine, EngineProcess)
    try:
        assert engine.probe(60).ready
        asked = [
            GenerationRequest(
                prompts=(tuple(range(1, 20 + 3 * i)),),
                max_tokens=60,
                sampling=SamplingParams(temperature=i % 2, seed=i, top_k=20),
            )
            for i in range(12)
        ]
        tickets = [engine.submit(one) for one in asked]
        assert all(ticket.wait(120) for ticket in tickets)
        return [ticket.outputs()[0].tokens for ticket in tickets]
    finally:
        engine.close(10)


@pytest.mark.parametrize("graphs", [True, False])
def test_two_gpus_answer_as_one(server: RankServer, tmp_path: Path, graphs: bool) -> None:
    path, said = save_native(tmp_path / "model", llama(**SIZES)), list[str]()
    one = answers(server, path, 1, said, cuda_graphs=graphs)
    two = answers(server, path, 2, said, cuda_graphs=graphs)
    # In fp32 hardly a choice is close enough for rounding to matter.
    assert sum(a == b for a, b in zip(one, two, strict=True)) >= 11
    assert not said  # as where a step could not be captured
