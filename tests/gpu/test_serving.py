"""Generation on CUDA: the same greedy tokens as on the CPU, alone and in a batch."""

from __future__ import annotations

import copy

import pytest
import torch

from serving.generation import generate
from serving.requests import GenerationRequest
from serving.sampling import SamplingParams
from tests.models.sizes import llama_config, small_config, small_model
from tests.serving.models import ByteTokenizer

PROMPTS = tuple(tuple(range(3, 3 + length)) for length in (1, 5, 17, 9))


@pytest.mark.parametrize("make", [llama_config, small_config], ids=["llama", "gpt2"])
def test_greedy_tokens_equal_the_cpu(make: type) -> None:
    tokenizer = ByteTokenizer()
    config = make(vocab_size=tokenizer.vocab_size, max_position_embeddings=128, init_method_std=0.2)
    cpu = small_model(config)
    gpu = copy.deepcopy(cpu).to("cuda")
    ask = GenerationRequest(
        prompts=PROMPTS, max_tokens=40, sampling=SamplingParams(temperature=0.0)
    )
    with torch.inference_mode():
        expected = [output.tokens for output in generate(cpu, tokenizer, ask)]
        together = [output.tokens for output in generate(gpu, tokenizer, ask)]
        alone = [output.tokens for output in generate(gpu, tokenizer, ask, max_rows=1)]
    assert together == expected and alone == expected


def test_bf16_is_reproducible_with_a_seed() -> None:
    tokenizer = ByteTokenizer()
    config = llama_config(vocab_size=tokenizer.vocab_size, max_position_embeddings=128)
    model = small_model(config).to("cuda")
    for parameter in model.parameters():  # the rotary tables stay fp32, as in load_model
        parameter.data = parameter.data.bfloat16()
    ask = GenerationRequest(prompts=PROMPTS, max_tokens=20, sampling=SamplingParams(seed=3))
    with torch.inference_mode():
        first, second = generate(model, tokenizer, ask), generate(model, tokenizer, ask)
    assert [o.tokens for o in first] == [o.tokens for o in second]
