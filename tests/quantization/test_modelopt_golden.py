"""Our ModelOpt dialect against NVIDIA ModelOpt's own export of the same model, byte by byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mtk.config import make
from mtk.config.quantize import QuantizeConfig
from mtk.convert.open_model import open_model
from stages.convert import run as convert
from stages.quantize import run
from tests.convert.models import TEXT, convert_config, llama, quiet, save_native

pytestmark = [
    pytest.mark.slow,
    # ModelOpt and what it imports warn about optional parts that are not installed.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same model in bf16, quantised by mtk and by ModelOpt."""
    mtq = pytest.importorskip("modelopt.torch.quantization", reason="nvidia-modelopt is absent")
    export = pytest.importorskip("modelopt.torch.export")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("golden")
    native = save_native(folder / "native", llama(num_layers=2, hidden_size=64))
    hf = convert(convert_config(native, folder / "hf", dtype="bf16"), quiet()).path
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    config = make(
        QuantizeConfig,
        load=str(hf),
        save=str(folder / "ours"),
        valid_data=str(folder / "text.txt"),
        max_perplexity_increase=50.0,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.bfloat16)
    mtq.quantize(model, mtq.INT8_WEIGHT_ONLY_CFG, lambda m: m(torch.arange(20)[None]))
    export.export_hf_checkpoint(model, export_dir=folder / "theirs")
    return run(config, quiet()).path, folder / "theirs"


def test_tensors(homes: tuple[Path, Path]) -> None:
    ours, theirs = (load_file(home / "model.safetensors") for home in homes)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def test_configuration(homes: tuple[Path, Path]) -> None:
    ours, theirs = (json.loads((home / "hf_quant_config.json").read_text()) for home in homes)
    assert ours["quantization"] == theirs["quantization"]
    mine, other = (
        json.loads((home / "config.json").read_text())["quantization_config"] for home in homes
    )
    for part in (mine, other):
        part.pop("producer")
    assert mine == other


def test_their_directory_opens_here(homes: tuple[Path, Path]) -> None:
    x_BS = torch.arange(40).view(2, 20)
    ours, theirs = (open_model(home).model(x_BS) for home in homes)
    assert torch.equal(ours, theirs)
