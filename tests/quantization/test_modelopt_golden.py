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
from mtk.quantization.linear import QuantizedLinear
from stages.convert import run as convert
from stages.quantize import run
from tests.convert.models import TEXT, convert_config, llama, quiet, save_native

pytestmark = [
    pytest.mark.slow,
    # ModelOpt and what it imports warn about optional parts that are not installed.
    pytest.mark.filterwarnings("ignore"),
]


# ModelOpt's configuration of each format that both round alike.
CONFIGS = {"int8_wo": "INT8_WEIGHT_ONLY_CFG", "fp8": "FP8_PER_CHANNEL_PER_TOKEN_CFG"}


# Matrices, and the norm that their inputs come from.
WITH_NORMS = {
    "attention.query": "attention_norm",
    "attention.output": None,
    "mlp.gate": "mlp_norm",
    "mlp.down": None,
}


@pytest.fixture(scope="module", params=CONFIGS)
def homes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
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
        format=request.param,
        load=str(hf),
        save=str(folder / "ours"),
        valid_data=str(folder / "text.txt"),
        max_perplexity_increase=50.0,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.bfloat16)
    chosen = getattr(mtq, CONFIGS[request.param])
    mtq.quantize(model, chosen, lambda m: m(torch.arange(20)[None]))
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


def test_their_int4_awq_opens_here(tmp_path: Path) -> None:
    """With the factors of inputs that its search leaves beside some matrices, and folds into norms
    before the others: each matrix is the original to the error of INT4, and served packed the
    logits are the same."""
    mtq = pytest.importorskip("modelopt.torch.quantization", reason="nvidia-modelopt is absent")
    export = pytest.importorskip("modelopt.torch.export")
    transformers = pytest.importorskip("transformers")
    config = llama(num_layers=2, hidden_size=128, ffn_hidden_size=256)
    hf = convert(convert_config(save_native(tmp_path / "n", config), tmp_path / "hf"), quiet()).path
    model = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    ids = torch.arange(20)[None]
    mtq.quantize(model, mtq.INT4_AWQ_CFG, lambda m: m(ids))
    export.export_hf_checkpoint(model, dtype=torch.float32, export_dir=tmp_path / "theirs")
    stored = load_file(tmp_path / "theirs" / "model.safetensors")
    factors = [name for name in stored if name.endswith("pre_quant_scale")]
    assert factors and any(bool((stored[name] != 1).any()) for name in factors)
    found, before = (open_model(path).model for path in (tmp_path / "theirs", hf))
    packed = open_model(tmp_path / "theirs", packed=True).model
    assert sum(isinstance(module, QuantizedLinear) for module in packed.modules()) == 14
    for own, original in zip(found.layers.values(), before.layers.values(), strict=True):
        for name, norm in WITH_NORMS.items():
            pair = [block.get_submodule(name).weight for block in (own, original)]
            if norm is not None:
                for i, block in enumerate((own, original)):
                    pair[i] = pair[i] * block.get_submodule(norm).weight
            assert 0.02 < (pair[0] - pair[1]).norm() / pair[1].norm() < 0.2, name
    torch.testing.assert_close(packed(ids), found(ids), rtol=1e-4, atol=1e-4)
