"""Each dense decoder family, built by transformers in odd shapes: in, out and generating."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mtk.convert.hf_directory import read_hf_model
from mtk.convert.open_model import open_model
from mtk.models.gpt import GPT
from serving.generation import Decoder
from stages.convert import run
from tests.convert.foreign import MODELS, VOCAB, foreign_model
from tests.convert.models import convert_config, quiet
from tests.convert.test_transformers import complaints, offline

__all__ = ["complaints", "offline"]
transformers = pytest.importorskip("transformers")
PROMPT = [5, 17, 3, 200, 44, 9, 120]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Each model once: transformers' module, its directory, and the native one made of it."""
    made: dict[str, tuple[Any, Path, Path]] = {}

    def get(name: str) -> tuple[Any, Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model = foreign_model(name)
            model.save_pretrained(folder / "foreign")
            native = run(
                convert_config(folder / "foreign", folder / "native", to="native"), quiet()
            )
            made[name] = (model, folder / "foreign", native.path)
        return made[name]

    return get


def tokens() -> Tensor:
    return torch.randint(VOCAB, (2, 150), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_equal_on_the_way_in(name: str, saved: Any) -> None:
    model, _, native = saved(name)
    parity = json.loads((native / "parity.json").read_text())
    assert parity["reference"] == "mtk reference forward" and parity["passed"]
    with torch.no_grad():
        expected = model(tokens()).logits
    assert 0.3 < expected.std() < 20
    found = open_model(native).model(tokens())
    assert (found - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_out_again_bit_equal_and_without_a_warning(
    name: str, saved: Any, tmp_path: Path, complaints: list[str]
) -> None:
    _, foreign, native = saved(name)
    kind = MODELS[name][0]
    config = convert_config(native, tmp_path / "back", reference="transformers", hf_family=kind)
    back = run(config, quiet()).path
    before, after = load_file(foreign / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[each], after[each]) for each in before)
    again = transformers.AutoModelForCausalLM.from_pretrained(back)
    assert type(again) is type(saved(name)[0])
    assert complaints == []
    # What is stated comes back as it was stated.
    assert read_hf_model(back).config == read_hf_model(foreign).config


def generated(model: GPT, count: int) -> list[int]:
    """Greedily, with the cache that the server uses."""
    with torch.inference_mode():
        decoder = Decoder(model)
        decoder.cache.add_row()
        logits, _ = decoder.prefill(0, PROMPT)
        found = [int(logits.argmax())]
        while len(found) < count:
            found.append(int(decoder.decode(found[-1:])[0].argmax()))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_64_tokens_are_generated_alike(name: str, saved: Any) -> None:
    model, _, native = saved(name)
    found = model.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.int64),
        max_new_tokens=64,
        do_sample=False,
        eos_token_id=[],
        pad_token_id=0,
    )
    assert found[0, len(PROMPT) :].tolist() == generated(open_model(native).model, 64)


@pytest.mark.parametrize("name", MODELS)
def test_bf16_is_close_both_ways(name: str, tmp_path: Path) -> None:
    """Logits of about 0.2: near 1 the last bit of bf16 itself is worth 0.008."""
    model = foreign_model(name)
    calm(model)
    with torch.no_grad():
        exact = model(tokens()).logits
    assert 0.15 < exact.std() < 0.35
    model = model.bfloat16()
    model.save_pretrained(tmp_path / "foreign")
    with torch.no_grad():
        theirs = model(tokens()).logits.float()
    ours = open_model(tmp_path / "foreign", dtype=torch.bfloat16).model(tokens()).float()
    # Roundings of the same numbers are no further apart than each is from the truth, and on some
    # CPUs transformers is further from it than this.
    allowed = max(2e-2, 2 * (theirs - exact).abs().max().item())
    assert (ours - theirs).abs().max() <= allowed
    # No further from the truth than transformers itself.
    distances = [(each - exact).pow(2).mean().sqrt() for each in (ours, theirs)]
    assert distances[0] <= 1.2 * distances[1]
    native = run(convert_config(tmp_path / "foreign", tmp_path / "native", to="native"), quiet())
    back = run(convert_config(native.path, tmp_path / "back"), quiet()).path
    again = transformers.AutoModelForCausalLM.from_pretrained(
        back, dtype=torch.bfloat16, attn_implementation="eager"
    )
    with torch.no_grad():
        assert (again(tokens()).logits.float() - ours).abs().max() <= allowed


@torch.no_grad()
def calm(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.mul_(0.2 if "embed" in name or "lm_head" in name else 0.3)
