"""Greedy continuations of 64 tokens equal those of ``transformers`` on the exported model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from mtk.config.model import ModelConfig
from serving.generation import generate
from serving.open_served import open_served
from serving.requests import GenerationRequest
from serving.sampling import SamplingParams
from stages import convert
from tests.convert.models import TEXT, convert_config, gpt2_config, llama, quiet, save_native

TOKENS = 64
PROMPTS = [TEXT[start : start + 3 + start % 29] for start in range(1, 61, 3)]


def their_continuations(folder: Path, prompts: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    transformers: Any = pytest.importorskip("transformers")
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        ).eval()
        for ids in prompts:
            tokens = torch.tensor([ids])
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=TOKENS,
                min_new_tokens=TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            found.append(tuple(out[0, len(ids) :].tolist()))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        gpt2_config(max_position_embeddings=128),
        llama(max_position_embeddings=128),
        llama(max_position_embeddings=128, num_query_groups=1),
    ],
    ids=["gpt2", "llama", "multi-query"],
)
def test_greedy_equals_transformers(config: ModelConfig, tmp_path: Path) -> None:
    native = save_native(tmp_path / "native", config)
    exported = tmp_path / "hf"
    convert.run(convert_config(native, exported), quiet())
    theirs: list[tuple[int, ...]] = []
    for source in (native, exported):
        served = open_served(str(source), dtype=torch.float32, device="cpu")
        assert served.lineage is not None and len(served.lineage["digest"]) == 64
        prompts = [tuple(served.tokenizer.encode(text)) for text in PROMPTS]
        assert len(prompts) == 20
        request = GenerationRequest(
            prompts=tuple(prompts), max_tokens=TOKENS, sampling=SamplingParams(temperature=0)
        )
        mine = generate(served.model, served.tokenizer, request, max_rows=7)
        theirs = theirs or their_continuations(exported, prompts)
        assert [output.tokens for output in mine] == theirs
    assert len(set(theirs)) > 5
