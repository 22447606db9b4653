"""T5 between transformers' layout and mtk's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtk.convert import families
from mtk.convert.families import family_for
from mtk.convert.mapping import Rename, Rule
from mtk.convert.open_model import open_model
from mtk.convert.t5 import T5
from mtk.errors import ConversionError, GateError
from stages.convert import run
from tests.convert.models import convert_config, quiet
from tests.models.sizes import small_config

pytestmark = pytest.mark.slow
transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 131, "d_model": 48, "d_kv": 10, "d_ff": 72, "num_layers": 2, "num_heads": 6,
    "relative_attention_num_buckets": 12, "relative_attention_max_distance": 40,
    "decoder_start_token_id": 0, "pad_token_id": 0, "initializer_factor": 1.0,
}  # fmt: skip
CASES: list[dict[str, Any]] = [
    {},
    {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    {"feed_forward_proj": "gated-silu", "layer_norm_epsilon": 1e-4, "num_heads": 5},
]


def foreign(**changes: Any) -> Any:
    """A random model whose norms and tables matter."""
    torch.manual_seed(3)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**(SIZES | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "bias" in name:
                parameter.add_(0.5 * torch.randn_like(parameter))
    return model.eval()


def files(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_in_and_out_bit_equal(changes: dict[str, Any], tmp_path: Path, caplog: Any) -> None:
    model = foreign(**changes)
    model.save_pretrained(tmp_path / "foreign", max_shard_size="40KB")
    native = run(
        convert_config(
            tmp_path / "foreign", tmp_path / "native", to="native", reference="transformers"
        ),
        quiet(),
    )
    back = run(
        convert_config(native.path, tmp_path / "back", reference="transformers"), quiet()
    ).path
    parity = json.loads((back / "parity.json").read_text())
    assert parity["passed"] and parity["max_abs_logit_error"] <= 1e-4
    before, after = files(tmp_path / "foreign"), files(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    loaded, report = type(model).from_pretrained(back, output_loading_info=True)
    assert not any(report.values()) and caplog.text == ""
    x_BS = torch.randint(1, 131, (1, 21), generator=torch.Generator().manual_seed(1))
    theirs = loaded.eval().generate(
        x_BS, max_new_tokens=64, min_new_tokens=64, do_sample=False, eos_token_id=None
    )
    ours = open_model(native.path).model
    out = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        for _ in range(64):
            logits: Any = ours(x_BS, out)  # type: ignore[arg-type]
            out = torch.cat((out, logits[:, -1:].argmax(-1)), 1)
    assert theirs.tolist() == out.tolist()


@pytest.mark.parametrize("changes", CASES, ids=str)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_plain_reference_agrees(changes: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    foreign(**changes).save_pretrained(tmp_path / "foreign")
    options = {"to": "native", "dtype": dtype}
    path = run(convert_config(tmp_path / "foreign", tmp_path / "native", **options), quiet()).path
    parity = json.loads((path / "parity.json").read_text())
    assert parity["reference"] == "mtk reference forward"
    assert parity["max_abs_logit_error"] <= 1e-4


def test_an_output_matrix_of_its_own(tmp_path: Path) -> None:
    """As the files of T5 1.1 have it."""
    foreign(feed_forward_proj="gated-gelu").save_pretrained(tmp_path / "foreign")
    path = tmp_path / "foreign" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps(config | {"tie_word_embeddings": False, "scale_decoder_outputs": False})
    )
    tensors = files(tmp_path / "foreign")
    tensors["lm_head.weight"] = torch.randn(131, 48)
    save_file(tensors, tmp_path / "foreign" / "model.safetensors", metadata={"format": "pt"})
    native = run(convert_config(tmp_path / "foreign", tmp_path / "native", to="native"), quiet())
    assert open_model(native.path).model.output is not None
    back = run(convert_config(native.path, tmp_path / "back"), quiet()).path
    assert all(torch.equal(files(back)[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("reference", ["transformers", "plain"])
def test_version_1_1_saved_again_by_transformers_5(reference: str, tmp_path: Path) -> None:
    """Its config.json calls every T5 tied; the old name of the class is known too."""
    folder = tmp_path / "foreign"
    foreign(feed_forward_proj="gated-gelu", tie_word_embeddings=False).save_pretrained(folder)
    tensors = files(folder) | {"lm_head.weight": torch.randn(131, 48)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] and not config["scale_decoder_outputs"]
    (folder / "config.json").write_text(
        json.dumps(config | {"architectures": ["T5WithLMHeadModel"]})
    )
    options = {"to": "native", "reference": reference}
    native = run(convert_config(folder, tmp_path / "native", **options), quiet()).path
    opened = open_model(native)
    assert opened.model.output is not None and not opened.config.scale_tied_output
    assert torch.equal(opened.model.output.weight[:131], tensors["lm_head.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense_act_fn": "gelu"}, "feed_forward_proj makes it 'gelu_new'"),
        ({"is_gated_act": False}, "feed_forward_proj makes it True"),
        ({"architectures": ["T5EncoderModel"]}, "supported is T5ForConditionalGeneration"),
        ({"hidden_size": 47}, "hidden_size = 47 and d_model = 48 are the same setting"),
    ],
    ids=str,
)
def test_what_transformers_reads_otherwise(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    foreign(feed_forward_proj="gated-gelu").save_pretrained(tmp_path / "foreign")
    path = tmp_path / "foreign" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConversionError, match=message):
        open_model(tmp_path / "foreign")


def renamed(rules: tuple[Rule, ...], one: str, other: str) -> tuple[Rule, ...]:
    """Two native names exchanged."""

    def changed(rule: Rule) -> Rule:
        if not isinstance(rule, Rename):
            return rule
        for a, b in ((one, other), (other, one)):
            if a in rule.native:
                return dataclasses.replace(rule, native=rule.native.replace(a, b))
        return rule

    return tuple(changed(rule) for rule in rules)


FAULTS = [
    ("query and key", ".attention.query", ".attention.key"),
    ("keys and values that look at the encoder", "cross_attention.key", "cross_attention.value"),
    ("own and crossing attention", "layers.2.attention.query", "layers.2.cross_attention.query"),
    ("norms of the stacks", "encoder_norm", "final_norm"),
    ("tables of the stacks", "encoder_bias", "decoder_bias"),
    ("gate and up", "mlp.gate", "mlp.up"),
    ("layers of the stacks", "layers.0.mlp", "layers.2.mlp"),
]


@pytest.mark.parametrize(("name", "one", "other"), FAULTS, ids=[f[0] for f in FAULTS])
def test_faults_are_refused(
    name: str, one: str, other: str, tmp_path: Path, monkeypatch: Any
) -> None:
    def table(config: Any) -> Any:
        whole = T5.weights(config)
        return dataclasses.replace(whole, rules=renamed(whole.rules, one, other))

    foreign(feed_forward_proj="gated-gelu").save_pretrained(tmp_path / "foreign")
    wrong = dataclasses.replace(T5, weights=table)
    known = [wrong if entry is T5 else entry for entry in families.FAMILIES]
    monkeypatch.setattr(families, "FAMILIES", tuple(known))
    with pytest.raises(GateError, match="first difference"):
        run(convert_config(tmp_path / "foreign", tmp_path / "native", to="native"), quiet())
    assert not (tmp_path / "native").exists()


def test_a_scaled_output_matters(tmp_path: Path) -> None:
    foreign().save_pretrained(tmp_path / "foreign")
    path = tmp_path / "foreign" / "config.json"
    config = json.loads(path.read_text())
    x_BS, out = torch.arange(1, 9)[None], torch.arange(5)[None]
    logits = []
    for scaled in (True, False):
        path.write_text(json.dumps(config | {"scale_decoder_outputs": scaled}))
        model: Any = open_model(tmp_path / "foreign").model
        logits.append(model(x_BS, out))
    torch.testing.assert_close(logits[0] * 48**0.5, logits[1])


def test_megatrons_t5_has_no_place_in_transformers() -> None:
    with pytest.raises(ConversionError) as caught:
        family_for(small_config(family="t5", decoder_seq_length=8))
    against = str(caught.value).split("not T5ForConditionalGeneration:")[1]
    assert "position_embedding_type = learned" in against and "softmax_scale = None" in against
