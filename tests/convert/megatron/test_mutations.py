"""Every seeded fault of the format is refused with exit code 5, whichever way it is met."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mtk.errors import ConversionError, GateError
from tests.convert.megatron.checkpoints import gpt2, legacy, legacy_args, save_ranks
from tests.convert.megatron.faults import (
    BOTH_WAYS,
    READING,
    SQUARE_CUT_WRONG,
    WRITING,
    Fault,
    version_ignored,
)
from tests.convert.megatron.natives import MODELS, mixtral, save, to_megatron, to_native
from tests.convert.models import gpt2_config, llama

CONFIGS = {
    "gpt2": gpt2_config(num_layers=4, vocab_size=301),
    "llama": llama(num_layers=4, num_query_groups=2, untie_embeddings_and_output_weights=True),
    "mixtral": mixtral(num_query_groups=2),
    "qwen3": MODELS["qwen3"],
    "llama3": MODELS["llama3"],
    "deepseek": MODELS["deepseek"],
    "bert": gpt2_config(num_layers=4, vocab_size=301, family="bert", bert_head_activation="gelu"),
}
TO_WRITE = BOTH_WAYS | {f"{name} (arguments)": entry for name, entry in WRITING.items()}
TO_READ = BOTH_WAYS | {f"{name} (reading)": entry for name, entry in READING.items()}


@pytest.fixture(scope="module")
def natives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("natives")
    return {name: save(folder / name, config) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def written(natives: dict[str, Path]) -> dict[str, Path]:
    return {
        name: to_megatron(path, path.with_name(f"{name}-megatron"), 2, 2)
        for name, path in natives.items()
    }


def refused(fault: Fault, patch: pytest.MonkeyPatch, convert: Callable[[], object]) -> None:
    fault(patch)
    with pytest.raises(GateError, match="first difference") as caught:
        convert()
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("name", TO_WRITE)
def test_writing_with_a_fault_is_refused(
    name: str, natives: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, fault = TO_WRITE[name]
    refused(fault, monkeypatch, lambda: to_megatron(natives[kind], tmp_path / "m", 2, 2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", TO_READ)
def test_reading_with_a_fault_is_refused(
    name: str, written: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, fault = TO_READ[name]
    refused(fault, monkeypatch, lambda: to_native(written[kind], tmp_path / "n"))
    assert list(tmp_path.iterdir()) == []


def test_resharding_with_a_fault_of_reading_is_refused(
    written: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault is undone on the way out: only the source's own certificate sees it."""
    kind, fault = BOTH_WAYS["qkv in the order of version 0"]
    refused(fault, monkeypatch, lambda: to_megatron(written[kind], tmp_path / "m", 1, 1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", ["write", "read"])
def test_a_wrong_dimension_shows_in_the_shapes(
    way: str,
    natives: dict[str, Path],
    written: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    SQUARE_CUT_WRONG(monkeypatch)
    with pytest.raises(ConversionError, match=r"linear_proj|do not fit each other"):
        if way == "write":
            to_megatron(natives["llama"], tmp_path / "m", 2, 2)
        else:
            to_native(written["llama"], tmp_path / "n")
    assert list(tmp_path.iterdir()) == []


def test_thirty_faults() -> None:
    assert len(BOTH_WAYS) + len(READING) + len(WRITING) >= 30


@pytest.mark.parametrize("version", [0, 1])
def test_a_version_ignored_is_refused(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = gpt2()
    ranks = legacy(model, version=version)
    source = save_ranks(tmp_path / "m", ranks, args=legacy_args(model), version=float(version))
    refused(version_ignored, monkeypatch, lambda: to_native(source, tmp_path / "n"))
    assert not (tmp_path / "n").exists()
