"""Each family with experts, built by transformers in odd shapes: in, out and generating."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mtk.checkpoint.tensors import read_tensors
from mtk.convert.hf_directory import read_hf_model
from mtk.convert.open_model import open_model
from mtk.models.gpt import GPT
from serving.generation import Decoder
from stages.convert import run
from tests.convert.expert_models import MODELS, VOCAB, expert_model
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
            model = expert_model(name)
            model.save_pretrained(folder / "foreign")
            config = convert_config(
                folder / "foreign", folder / "native", to="native", reference="transformers"
            )
            made[name] = (model, folder / "foreign", run(config, quiet()).path)
        return made[name]

    yield get


def tokens() -> Tensor:
    return torch.randint(VOCAB, (2, 150), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_equal_on_the_way_in(name: str, saved: Any) -> None:
    model, foreign, native = saved(name)
    parity = json.loads((native / "parity.json").read_text())
    assert parity["reference"].startswith("transformers") and parity["passed"]
    with torch.no_grad():
        expected = model(tokens()).logits
    assert 0.3 < expected.std() < 20
    for folder in (native, foreign):
        assert (open_model(folder).model(tokens()) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_out_again_bit_equal_and_without_a_warning(
    name: str, saved: Any, tmp_path: Path, complaints: list[str]
) -> None:
    """Certified by the reference forward, which transformers has no part in."""
    _, foreign, native = saved(name)
    config = convert_config(native, tmp_path / "back", hf_family=MODELS[name][0])
    back = run(config, quiet()).path
    assert json.loads((back / "parity.json").read_text())["reference"] == "mtk reference forward"
    before, after = load_file(foreign / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[each], after[each]) for each in before)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        back, output_loading_info=True
    )
    assert type(again) is type(saved(name)[0]) and not any(report.values())
    assert complaints == []
    assert read_hf_model(back).config == read_hf_model(foreign).config


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
def test_stacked_experts_are_read_too(name: str, saved: Any, tmp_path: Path) -> None:
    """What transformers 5 writes when it keeps its own names, in several files."""
    model, _, native = saved(name)
    model.save_pretrained(tmp_path / "own", save_original_format=False, max_shard_size="40KB")
    names = read_names(tmp_path / "own")
    assert any(each.endswith("experts.gate_up_proj") for each in names)
    again = run(convert_config(tmp_path / "own", tmp_path / "again", to="native"), quiet()).path
    before, after = read_tensors(native, "model"), read_tensors(again, "model")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[each], after[each]) for each in before)


def read_names(folder: Path) -> list[str]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return list(index["weight_map"])


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_bf16_is_close_both_ways(name: str, tmp_path: Path) -> None:
    """Logits of about 0.2: near 1 the last bit of bf16 itself is worth 0.008. Tokens are so
    that rounding decides on no expert."""
    model = expert_model(name)
    calm(model)
    decide(model)
    with torch.no_grad():
        exact = model(tokens()).logits
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


@torch.no_grad()
def decide(model: torch.nn.Module) -> None:
    """Each token prefers experts in an order of its own, far apart, by its first channels, which
    no layer writes to."""
    generator = torch.Generator().manual_seed(3)
    weights = dict(model.named_parameters())
    routers = [w for n, w in weights.items() if n.endswith("mlp.gate.weight")]
    experts = len(routers[0])
    levels = torch.arange(experts) - (experts - 1) / 2
    orders = torch.rand(VOCAB, experts, generator=generator).argsort(-1)
    weights["model.embed_tokens.weight"][:, :experts] = 0.05 * levels[orders]
    for name, weight in weights.items():
        if name.endswith("post_attention_layernorm.weight"):
            weight[:experts] = 1.0
        if name.endswith("mlp.gate.weight"):
            weight.copy_(torch.eye(*weight.shape))
        if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
            weight[..., :experts, :] = 0.0
