"""Mamba-2 to and from Hugging Face: bits, logits, generated text, and seeded faults."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mtk.config.model import ModelConfig
from mtk.convert import families
from mtk.convert.families import family_for
from mtk.convert.mamba2 import MAMBA2, FuseChannels
from mtk.convert.mapping import Fuse, Rename
from mtk.convert.open_model import open_model
from mtk.errors import ConversionError, GateError
from serving.generation import Decoder
from stages.convert import run
from tests.convert.faults import (
    Fault,
    config_fault,
    fused,
    lost,
    next_layer,
    permuted,
    replaced,
    shifted,
    swapped,
    table_fault,
)
from tests.convert.models import VOCAB, convert_config, quiet, save_native
from tests.convert.test_mutations import survives_round_trip
from tests.models.mamba_sizes import hybrid_config, mamba_config

transformers = pytest.importorskip("transformers")


def config(**changes: Any) -> ModelConfig:
    return mamba_config(**({"vocab_size": VOCAB} | changes))


CONFIGS = {
    "tied": config(),
    "untied-biases": config(untie_embeddings_and_output_weights=True, add_bias_linear=True),
    "one-group-odd-vocabulary": config(mamba_num_groups=1, vocab_size=385, mamba_conv_bias=False),
    "groups-as-heads-limited": config(
        mamba_num_groups=12, mamba_dt_limit=(0.05, 0.6), mamba_conv_width=3
    ),
    "three-times-as-wide": config(mamba_num_heads=18, mamba_num_groups=2, norm_epsilon=1e-3),
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def complaints() -> Iterator[list[str]]:
    """What transformers logs at WARNING or above while the test runs, but for its advice to
    install faster kernels, which it gives once a process for any such model."""
    found: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "is falling back to its reference PyTorch" not in record.getMessage():
                found.append(record.getMessage())

    handler = Collect(logging.WARNING)
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def continuation(path: Path, prompt: list[int], count: int) -> list[int]:
    """Greedy text from the caches that the server uses."""
    decoder = Decoder(open_model(path).model)
    ids = list(prompt)
    with torch.inference_mode():
        logits, _ = decoder.prefill(decoder.cache.add_row(), prompt)
        for _ in range(count):
            ids.append(int(logits.argmax()))
            logits = decoder.decode(ids[-1:])[0]
    return ids


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_certificate_and_greedy_text(name: str, tmp_path: Path, complaints: list[str]) -> None:
    native = save_native(tmp_path / "native", CONFIGS[name])
    artifact = run(convert_config(native, tmp_path / "hf", reference="transformers"), quiet())
    parity = json.loads((artifact.path / "parity.json").read_text())
    assert parity["reference"].startswith("transformers ") and parity["passed"]
    assert parity["max_abs_logit_error"] <= 1e-4 and parity["top1_agreement"] == 1.0
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        artifact.path, output_loading_info=True
    )
    assert not any(report.values())
    prompt = [5, 17, 3, 200]
    found = model.generate(
        # With a limit on steps transformers' cache computes something else than its forward.
        torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=[],
        use_cache="limited" not in name,
    )  # fmt: skip
    assert found[0].tolist() == continuation(native, prompt, 64)
    assert complaints == []


def foreign_model(**changes: Any) -> Any:
    """A random model made by transformers itself; every weight matters."""
    torch.manual_seed(7)
    values = {
        "vocab_size": VOCAB, "hidden_size": 36, "num_heads": 12, "head_dim": 6, "n_groups": 3,
        "state_size": 10, "num_hidden_layers": 3, "chunk_size": 16, "initializer_range": 0.3,
    }  # fmt: skip
    model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**(values | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
            elif "conv1d" in name:
                parameter.normal_()
    return model.eval()


FOREIGN: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": True, "use_bias": True, "vocab_size": 383},
    {"n_groups": 1, "use_conv_bias": False, "expand": 3, "num_heads": 9, "head_dim": 12},
    {"conv_kernel": 2, "layer_norm_epsilon": 1e-3, "time_step_limit": (0.1, 0.9)},
]


@pytest.mark.slow
@pytest.mark.parametrize("changes", FOREIGN, ids=str)
def test_foreign_models_come_in_and_go_out_bit_equal(
    changes: dict[str, Any], tmp_path: Path, complaints: list[str]
) -> None:
    model = foreign_model(**changes)
    model.save_pretrained(tmp_path / "foreign", max_shard_size="30KB")
    native = run(
        convert_config(
            tmp_path / "foreign", tmp_path / "native", to="native", reference="transformers"
        ),
        quiet(),
    )
    x_BS = torch.randint(VOCAB, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(x_BS).logits
    assert (open_model(native.path).model(x_BS) - expected).abs().max() < 1e-4
    back = run(convert_config(native.path, tmp_path / "back"), quiet()).path
    before: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "foreign").glob("*.safetensors"):
        before |= load_file(file)
    after = load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = transformers.AutoModelForCausalLM.from_pretrained(back)
    assert (again(x_BS).logits - expected).abs().max() < 1e-6
    assert complaints == []


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_precision_both_ways(dtype: str, tmp_path: Path) -> None:
    native = save_native(tmp_path / "native", config(add_bias_linear=True))
    options = {"dtype": dtype, "reference": "transformers", "tolerance": 2e-2}
    there = run(convert_config(native, tmp_path / "hf", **options), quiet()).path
    back = run(convert_config(there, tmp_path / "n", to="native", **options), quiet()).path
    for folder in (there, back):
        assert json.loads((folder / "parity.json").read_text())["max_abs_logit_error"] <= 2e-2


def reordered(*order: int) -> Fault:
    """Parts of a stacked weight in another order; parts that trade places are of one size."""

    def change(rule: Fuse) -> Fuse:
        if len(rule.natives) != len(order):
            return rule
        return replace(rule, natives=tuple(rule.natives[place] for place in order))

    return fused(change)


def turned(rule: Fuse) -> Fuse:
    return Turned(rule.natives, rule.foreign, rule.sizes) if type(rule) is FuseChannels else rule


class Turned(FuseChannels):
    """The newest token's weight first."""

    def to_foreign(self, native: Any) -> tuple[torch.Tensor, ...]:
        return (super().to_foreign(native)[0].flip(-1).contiguous(),)

    def to_native(self, foreign: Any) -> tuple[torch.Tensor, ...]:
        return super().to_native([foreign[0].flip(-1)])


class Negated(Rename):
    """The logarithm of 1 / A."""

    def to_foreign(self, native: Any) -> tuple[torch.Tensor, ...]:
        return (-native[0],)

    def to_native(self, foreign: Any) -> tuple[torch.Tensor, ...]:
        return (-foreign[0],)


FAULTS: dict[str, Fault] = {
    "z and x swapped": reordered(1, 0, 2, 3, 4),
    "B and C swapped": reordered(0, 1, 3, 2, 4),
    "convolutions of B and C swapped": reordered(0, 2, 1),
    "convolution flipped": fused(turned),
    "D missing": lost("mamba.skip", 0.0),
    "dt_bias missing": lost("mamba.dt_bias", 0.0),
    "dt_bias off by one head": permuted("mamba.dt_bias", shifted),
    "A of the wrong sign": replaced("mamba.a_log", lambda r: Negated(r.native, r.foreign)),
    "gated norm skipped": lost("mamba.norm.weight", 1.0),
    "norm skipped": lost("mamba_norm.weight", 1.0),
    "D and dt_bias swapped": swapped("mamba.skip", "mamba.dt_bias"),
    "layers off by one": table_fault(next_layer),
    "groups wrong": config_fault(
        {"n_groups": 1, "state_size": 30}, {"mamba_num_groups": 1, "mamba_state_dim": 30}
    ),
    "epsilon wrong": config_fault({"layer_norm_epsilon": 1e-2}, {"norm_epsilon": 1e-2}),
    "steps limited": config_fault({"time_step_limit": [0.1, 0.2]}, {"mamba_dt_limit": (0.1, 0.2)}),
}


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mamba2") / "native"
    return save_native(folder, config(mamba_num_heads=6, seq_length=14), tokenizer=False)


@pytest.fixture(scope="module")
def exported(native: Path) -> Path:
    return run(convert_config(native, native.with_name("hf")), quiet()).path


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_refused_both_ways(
    name: str, native: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty = tuple(FAULTS[name](f) if f is MAMBA2 else f for f in families.FAMILIES)
    monkeypatch.setattr(families, "FAMILIES", faulty)
    for load, to in ((native, "hf"), (exported, "native")):
        with pytest.raises(GateError, match="first difference") as caught:
            run(convert_config(load, tmp_path / "out", to=to), quiet())
        assert caught.value.exit_code == 5
        assert list(tmp_path.iterdir()) == []


def test_a_round_trip_alone_misses_most_faults(native: Path) -> None:
    missed = [name for name, fault in FAULTS.items() if survives_round_trip(MAMBA2, fault, native)]
    assert len(FAULTS) == 15
    assert len(missed) >= 11, missed


def test_models_that_are_no_mamba2_are_refused_with_reasons() -> None:
    with pytest.raises(ConversionError, match=r"M-\*M: every layer of Mamba2 is one") as caught:
        family_for(hybrid_config())
    assert "GPT2LMHeadModel" in str(caught.value)
    with pytest.raises(ConversionError, match="wants a multiple of"):
        family_for(config(mamba_num_heads=9))
    with pytest.raises(ConversionError, match="Mamba2 needs none"):
        family_for(config(position_embedding_type="learned", normalization="LayerNorm"))
    with pytest.raises(ConversionError, match="scale_embeddings = True: Mamba2 has nothing"):
        family_for(config(scale_embeddings=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "only silu"),
        ({"rescale_prenorm_residual": True}, "whenever it loads"),
        ({"num_heads": 13}, "is not expand x hidden_size"),
        ({"time_step_limit": [0.5]}, "is not two numbers"),
        ({"time_step_limit": [0.5, {"__float__": "Infinity"}]}, "both sides only"),
        ({"n_groups": 5}, "must divide the 12 heads"),
        ({"num_hidden_layers": 0}, "names no layer"),
        ({"num_hidden_layers": 4}, "missing"),
        ({"state_size": 11}, "config.json asks for"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    foreign_model().save_pretrained(tmp_path / "foreign")
    path = tmp_path / "foreign" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConversionError, match=message):
        open_model(tmp_path / "foreign")
