"""Models with experts in the engine: whatever else is in a batch, and however a prompt was cut,
a request gets the tokens that it gets alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from serving.requests import BeamParams, GenerationRequest
from serving.sampling import SamplingParams
from serving.torch_engine import TorchEngine
from tests.serving.models import LLAMA_LIKE, ByteTokenizer, greedy_without_cache, tiny_model

EXPERTS: dict[str, object] = {**LLAMA_LIKE, "num_experts": 8}
KINDS: dict[str, dict[str, object]] = {
    # A capacity is of training: a batch that all goes to one expert loses nothing.
    "mixtral": {**EXPERTS, "moe_expert_capacity_factor": 0.25},
    "sinkhorn": {**EXPERTS, "moe_router_load_balancing_type": "sinkhorn", "moe_router_topk": 1},
    "deepseek": {
        **EXPERTS,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_shared_expert_intermediate_size": 16,
        "moe_shared_expert_gate": True,
        "moe_layer_freq": "[0]+[1]",
    },
}


@pytest.fixture(params=KINDS)
def engine_and_model(request: pytest.FixtureRequest) -> Iterator[tuple[TorchEngine, Any]]:
    torch.set_num_threads(1)
    kind = KINDS[request.param]
    models = [tiny_model(3, **kind) for _ in range(2)]
    for model in models:
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(torch.linspace(-0.3, 0.3, len(buffer)))
    engine = TorchEngine(
        models[0], ByteTokenizer(), context=96, max_batch_size=4, report=lambda line: None
    )
    yield engine, models[1]
    engine.close(timeout=10)


def test_many_requests_at_once_get_their_own_answers(
    engine_and_model: tuple[TorchEngine, Any],
) -> None:
    engine, model = engine_and_model
    assert engine.probe(10).ready
    prompts = [bytes([65 + i]) * (1 + 5 * i % 17) for i in range(10)]
    tickets = [
        engine.submit(
            GenerationRequest(
                prompts=(tuple(prompt),),
                sampling=SamplingParams(temperature=0),
                max_tokens=64 if i == 0 else 4 + i,
            )
        )
        for i, prompt in enumerate(prompts)
    ]
    beam = BeamParams(width=3, length_penalty=1.0, stop_token=256)
    search = engine.submit(GenerationRequest(prompts=(tuple(b"ab"),), beam=beam, max_tokens=6))
    for i, (prompt, ticket) in enumerate(zip(prompts, tickets, strict=True)):
        assert ticket.wait(60)
        expected = greedy_without_cache(model, prompt, 64 if i == 0 else 4 + i)
        assert list(ticket.outputs()[0].tokens) == expected
    assert search.wait(60) and len(search.outputs()) == 3
