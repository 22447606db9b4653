"""500 prompts through the engine, 32 at a time as they come: each gets what it gets alone."""

from __future__ import annotations

import random
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from mtk.config.serve import CacheConfig
from mtk.models.gpt import GPT
from mtk.tokenizers import Tokenizer
from serving.engine import Ticket
from serving.open_served import open_served
from serving.requests import GenerationRequest, SequenceOutput
from serving.sampling import SamplingParams
from serving.torch_engine import TorchEngine
from stages import convert
from tests.convert.models import convert_config, llama, quiet, save_native

COUNT, NEW, LONGEST = 500, 12, 40
SAMPLING = SamplingParams(temperature=0, logprobs=0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("five_hundred")
    native = save_native(folder / "native", llama(max_position_embeddings=128))
    convert.run(convert_config(native, folder / "hf"), quiet())
    return folder / "hf"


def prompts(vocab: int) -> list[tuple[int, ...]]:
    """Of all lengths; two in five begin like others, for more than a block."""
    chance = random.Random(3)
    heads = [tuple(chance.randrange(vocab) for _ in range(33)) for _ in range(4)]
    found = []
    for _ in range(COUNT):
        length = chance.randint(1, LONGEST)
        own = tuple(chance.randrange(vocab) for _ in range(length))
        head = chance.choice(heads)[: chance.randint(16, 33)] if chance.random() < 0.4 else ()
        found.append((head + own)[: max(length, len(head) + 1)])
    return found


def engine_of(model: GPT, tokenizer: Tokenizer, **options: Any) -> TorchEngine:
    return TorchEngine(
        model,
        tokenizer,
        context=64,
        max_batch_size=32,
        max_queue=COUNT,
        paged=CacheConfig(**options),
    )


def submit(engine: TorchEngine, prompt: tuple[int, ...]) -> Ticket:
    request = GenerationRequest(prompts=(prompt,), max_tokens=NEW, sampling=SAMPLING)
    return engine.submit(request)


def taken(ticket: Ticket) -> SequenceOutput:
    assert ticket.wait(60)
    (output,) = ticket.outputs()
    return output


def together(engine: TorchEngine, asked: list[tuple[int, ...]]) -> list[SequenceOutput]:
    """In bunches that come while others run."""
    chance, tickets = random.Random(4), []
    for prompt in asked:
        tickets.append(submit(engine, prompt))
        if chance.random() < 0.1:
            time.sleep(0.004)
    return [taken(ticket) for ticket in tickets]


def theirs(folder: Path, asked: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """By ``transformers``, those of one length together, so that none is padded."""
    transformers: Any = pytest.importorskip("transformers")
    found: dict[int, tuple[int, ...]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        ).eval()
        for length in sorted({len(prompt) for prompt in asked}):
            which = [i for i, prompt in enumerate(asked) if len(prompt) == length]
            tokens = torch.tensor([asked[i] for i in which])
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            found.update(zip(which, map(tuple, out[:, length:].tolist()), strict=True))
    return [found[i] for i in range(len(asked))]


@pytest.mark.slow
def test_in_a_batch_as_alone_as_transformers(exported: Path) -> None:
    """Tokens in the usual mode; every log-probability to its last bit in the deterministic one."""
    served = open_served(str(exported), dtype=torch.float32, device="cpu")
    asked = prompts(served.model.config.vocab_size or 0)
    assert len(asked) == COUNT and len({len(prompt) for prompt in asked}) > 35
    usual = engine_of(served.model, served.tokenizer)
    fixed = engine_of(served.model, served.tokenizer, deterministic_mode=True)
    try:
        batched = together(usual, asked)
        assert usual.stats().cache.prefix_found > 1000
        steady = together(fixed, asked)
        alone = [taken(submit(fixed, prompt)) for prompt in asked]
    finally:
        usual.close(10)
        fixed.close(10)
    for mine, single in zip(steady, alone, strict=True):
        assert (mine.tokens, mine.logprobs) == (single.tokens, single.logprobs)
    reference = theirs(exported, asked)
    assert [output.tokens for output in batched] == reference
    assert [output.tokens for output in steady] == reference
    assert len(set(reference)) > 300
