"""Mutation check: every seeded fault of the converter is refused with exit code 5.

A round trip alone would let most of them pass, because a fault in the table is made on
the way out and undone on the way in.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mtk.checkpoint.save import CheckpointContent
from mtk.convert import families
from mtk.convert.families import family_for
from mtk.convert.family import Family
from mtk.convert.open_model import read_native
from mtk.convert.parity import past_the_window
from mtk.convert.source import find_source
from mtk.errors import GateError
from mtk.models.buffers import kept_tensors
from stages.convert import run
from tests.checkpoint.publish import save_checkpoint
from tests.convert.family_faults import FAULTS, WRITING_ONLY
from tests.convert.faults import Fault
from tests.convert.models import (
    bloom,
    convert_config,
    gemma,
    gpt2_config,
    llama,
    loud_model,
    neox,
    quiet,
    save_native,
)

CONFIGS = {
    "llama": llama(
        num_query_groups=4, add_bias_linear=True, untie_embeddings_and_output_weights=True
    ),
    "llama3": llama(
        rotary_interleaved=True,
        rope_scaling_type="llama3",
        rope_scaling_factor=32.0,
        rope_original_max_positions=16,
    ),
    "gpt2": gpt2_config(),
    "mistral": llama(window_size=5),
    "qwen2": llama(add_qkv_bias=True),
    "qwen3": llama(qk_layernorm=True),
    "gemma": gemma(),
    "neox": neox(),
    "bloom": bloom(),
}
FAMILY = {model: family_for(config) for model, config in CONFIGS.items()}
IDS = [f"{model}: {name}" for model, name, _ in FAULTS]


@pytest.fixture(scope="module")
def natives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("natives")
    return {
        kind: save_native(folder / kind, config, tokenizer=False)
        for kind, config in CONFIGS.items()
    }


@pytest.fixture(scope="module")
def exported(natives: dict[str, Path]) -> dict[str, Path]:
    return {
        kind: run(convert_config(path, path.with_name(f"{kind}-hf")), quiet()).path
        for kind, path in natives.items()
    }


def seed_fault(monkeypatch: pytest.MonkeyPatch, model: str, fault: Fault) -> None:
    family = FAMILY[model]
    table = tuple(
        fault(family) if entry.model_type == family.model_type else entry
        for entry in families.FAMILIES
    )
    monkeypatch.setattr(families, "FAMILIES", table)


@pytest.mark.parametrize(("model", "name", "fault"), FAULTS, ids=IDS)
def test_export_with_a_fault_is_refused(
    model: str,
    name: str,
    fault: Fault,
    natives: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seed_fault(monkeypatch, model, fault)
    with pytest.raises(GateError, match="first difference") as caught:
        run(convert_config(natives[model], tmp_path / "hf"), quiet())
    assert caught.value.exit_code == 5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("model", "name", "fault"), FAULTS, ids=IDS)
def test_import_with_a_fault_is_refused(
    model: str,
    name: str,
    fault: Fault,
    exported: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if name in WRITING_ONLY:
        pytest.skip("a fault of writing only")
    seed_fault(monkeypatch, model, fault)
    with pytest.raises(GateError):
        run(convert_config(exported[model], tmp_path / "n", to="native"), quiet())
    assert list(tmp_path.iterdir()) == []


def survives_round_trip(family: Family, fault: Fault, native: Path) -> bool:
    """What a test that only converts there and back would see."""
    config, tensors = read_native(find_source(native))
    table = fault(family).weights(config)
    foreign = table.as_foreign(tensors)
    back = table.as_native({name: foreign[name] for name in foreign})
    vocab = config.vocab_size or 0
    return all(
        torch.equal(tensors[name][:vocab], back[name][:vocab])
        if name in ("embedding.tokens.weight", "output.weight")
        else torch.equal(tensors[name], back[name])
        for name in tensors
    )


def test_a_round_trip_alone_misses_most_faults(natives: dict[str, Path]) -> None:
    missed = [
        f"{model}: {name}"
        for model, name, fault in FAULTS
        if survives_round_trip(FAMILY[model], fault, natives[model])
    ]
    assert len(FAULTS) == 47
    assert len(missed) >= 35, missed


def test_logits_that_say_nothing_prove_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over an output matrix of zeros every fault gives the same logits."""
    config = llama(untie_embeddings_and_output_weights=True)
    model = loud_model(config)
    assert model.output is not None
    torch.nn.init.zeros_(model.output.weight)
    native = tmp_path / "native"
    content = CheckpointContent(config, kept_tensors(model))
    save_checkpoint(native, content, stage="pretrain", config=config, inputs=[], metrics={})
    run(convert_config(native, tmp_path / "right"), quiet())
    fault = next(fault for model, name, fault in FAULTS if name == "gate and up swapped")
    seed_fault(monkeypatch, "llama", fault)
    with pytest.raises(GateError, match="first difference: layer 0"):
        run(convert_config(native, tmp_path / "wrong"), quiet())


def test_a_window_that_no_sequence_reaches_needs_no_longer_prompt() -> None:
    assert past_the_window(300, 200, 150) is not None
    assert past_the_window(300, 200, 200) is None


def test_the_first_wrong_layer_is_named(
    natives: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {
        "embedding rows shifted": "the embedding",
        "gate and up swapped": "layer 0",
        "final norm skipped": "the final norm or the output matrix",
    }
    for model, name, fault in FAULTS:
        if model == "llama" and name in expected:
            seed_fault(monkeypatch, model, fault)
            with pytest.raises(GateError, match=f"first difference: {expected[name]}"):
                run(convert_config(natives["llama"], tmp_path / "hf"), quiet())
