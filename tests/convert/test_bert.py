"""BERT between transformers' two layouts and mtk's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtk.config.heads import TASKS
from mtk.convert import families
from mtk.convert.bert import BERT, MEGATRON_BERT
from mtk.convert.family import Family
from mtk.convert.mapping import Rename, Rule
from mtk.convert.open_model import open_model
from mtk.errors import ConversionError, GateError
from stages.convert import run
from tests.convert.models import convert_config, quiet

pytestmark = pytest.mark.slow
transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 131, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 72, "max_position_embeddings": 40, "type_vocab_size": 3,
    "initializer_range": 0.3,
}  # fmt: skip
CASES = [
    ("Bert", "ForPreTraining", {}),
    ("Bert", "ForMaskedLM", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-5}),
    ("MegatronBert", "ForPreTraining", {"hidden_act": "relu"}),
    ("MegatronBert", "ForMaskedLM", {}),
    ("Bert", "ForSequenceClassification", {"id2label": dict(enumerate(TASKS["MNLI"].labels))}),
    ("MegatronBert", "ForMultipleChoice", {}),
]


def foreign(kind: str, task: str, **changes: Any) -> Any:
    """A loud random model: no bias is zero and no norm one."""
    torch.manual_seed(11)
    config = getattr(transformers, f"{kind}Config")(**(SIZES | changes))
    model = getattr(transformers, kind + task)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(("kind", "task", "changes"), CASES, ids=str)
def test_in_and_out_bit_equal(
    kind: str, task: str, changes: dict[str, Any], tmp_path: Path, caplog: Any
) -> None:
    model = foreign(kind, task, **changes)
    model.save_pretrained(tmp_path / "foreign", max_shard_size="40KB")
    options = {"to": "native", "reference": "transformers"}
    native = run(convert_config(tmp_path / "foreign", tmp_path / "native", **options), quiet())
    back = run(
        convert_config(native.path, tmp_path / "back", reference="transformers"), quiet()
    ).path
    parity = json.loads((back / "parity.json").read_text())
    assert parity["passed"] and parity["max_abs_logit_error"] <= 1e-4
    before: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "foreign").glob("*.safetensors"):
        before |= load_file(file)
    after = load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    loaded, report = type(model).from_pretrained(back, output_loading_info=True)
    assert not any(report.values()) and caplog.text == ""
    x_BS = torch.randint(131, (2, 33), generator=torch.Generator().manual_seed(1))
    types = torch.randint(3, (2, 33))
    if task == "ForMultipleChoice":
        x_BS, types = x_BS[None], types[None]
    with torch.no_grad():
        expected = loaded.eval()(x_BS, token_type_ids=types)
        found = open_model(native.path).model(x_BS.view(-1, 33), types=types.view(-1, 33))
    if task != "ForPreTraining":
        pairs = [(found.view_as(expected.logits), expected.logits)]
    else:
        pairs = list(zip(found, (expected.prediction_logits, expected[1]), strict=True))
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("kind", "task", "changes"), CASES, ids=str)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_plain_reference_agrees(
    kind: str, task: str, changes: dict[str, Any], dtype: str, tmp_path: Path
) -> None:
    foreign(kind, task, **changes).save_pretrained(tmp_path / "foreign")
    path = run(
        convert_config(tmp_path / "foreign", tmp_path / "native", to="native", dtype=dtype), quiet()
    ).path
    parity = json.loads((path / "parity.json").read_text())
    assert parity["reference"] == "mtk reference forward"
    assert parity["max_abs_logit_error"] <= 1e-4


@pytest.mark.parametrize("reference", ["transformers", "plain"])
def test_files_as_they_were_published(reference: str, tmp_path: Path) -> None:
    """bert-base-uncased: norms with gamma and beta, copies of what is tied, a table of positions,
    and heads that the class named in config.json does not have, but finetuning wants."""
    model = foreign("Bert", "ForPreTraining", type_vocab_size=1)
    model.save_pretrained(tmp_path / "foreign")
    path = tmp_path / "foreign" / "model.safetensors"
    tensors = load_file(path)
    embedding = tensors["bert.embeddings.word_embeddings.weight"].clone()
    tensors |= {"cls.predictions.decoder.weight": embedding}
    tensors |= {"bert.embeddings.position_ids": torch.arange(40)[None]}
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, name in old.items():
        tensors = {key.replace(new, name): tensor for key, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    described = tmp_path / "foreign" / "config.json"
    config = json.loads(described.read_text()) | {"architectures": ["BertForMaskedLM"]}
    described.write_text(json.dumps(config))
    options = {"to": "native", "reference": reference}
    native = run(convert_config(tmp_path / "foreign", tmp_path / "native", **options), quiet())
    x_BS = torch.arange(2, 35)[None]
    with torch.no_grad():
        expected = model(x_BS)
        found = open_model(native.path).model(x_BS)
    torch.testing.assert_close(found[0], expected.prediction_logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(found[1], expected.seq_relationship_logits, rtol=0, atol=1e-4)
    half = {name: tensor for name, tensor in tensors.items() if "seq_relationship" not in name}
    save_file(half, path, metadata={"format": "pt"})
    assert not open_model(tmp_path / "foreign").config.bert_binary_head
    tensors["bert.embeddings.LayerNorm.weight"] = tensors["bert.embeddings.LayerNorm.gamma"] + 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"without a place: .*LayerNorm\.gamma"):
        open_model(tmp_path / "foreign")


def swapped(rules: tuple[Rule, ...], one: str, other: str) -> tuple[Rule, ...]:
    """Two native names exchanged."""

    def changed(rule: Rule) -> Rule:
        if not isinstance(rule, Rename):
            return rule
        if one in rule.native:
            return dataclasses.replace(rule, native=rule.native.replace(one, other))
        if other in rule.native:
            return dataclasses.replace(rule, native=rule.native.replace(other, one))
        return rule

    return tuple(changed(rule) for rule in rules)


FAULTS = [
    ("query and key", "attention.query", "attention.key"),
    ("the two norms of a layer", "attention_norm", "mlp_norm"),
    ("layers one and two", "layers.1.", "layers.2."),
    ("pooler and transform", "pooler.dense", "transform.dense"),
]


@pytest.mark.parametrize("family", [BERT, MEGATRON_BERT], ids=lambda f: f.model_type)
@pytest.mark.parametrize(("name", "one", "other"), FAULTS, ids=[f[0] for f in FAULTS])
def test_faults_are_refused(
    family: Family, name: str, one: str, other: str, tmp_path: Path, monkeypatch: Any
) -> None:
    def table(config: Any) -> Any:
        whole = family.weights(config)
        return dataclasses.replace(whole, rules=swapped(whole.rules, one, other))

    kind = "Bert" if family is BERT else "MegatronBert"
    foreign(kind, "ForPreTraining").save_pretrained(tmp_path / "foreign")
    wrong = dataclasses.replace(family, weights=table)
    known = [wrong if entry is family else entry for entry in families.FAMILIES]
    monkeypatch.setattr(families, "FAMILIES", tuple(known))
    with pytest.raises(GateError, match="first difference"):
        run(convert_config(tmp_path / "foreign", tmp_path / "native", to="native"), quiet())
    assert not (tmp_path / "native").exists()


def test_wrong_placement_is_refused(tmp_path: Path) -> None:
    """The other BERT's config.json over the same weights."""
    foreign("Bert", "ForPreTraining").save_pretrained(tmp_path / "foreign")
    path = tmp_path / "foreign" / "config.json"
    config = json.loads(path.read_text())
    config |= {"model_type": "megatron-bert", "architectures": ["MegatronBertForPreTraining"]}
    path.write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=r"missing.*without a place"):
        open_model(tmp_path / "foreign")


def test_other_tasks_are_refused(tmp_path: Path) -> None:
    foreign("Bert", "ForTokenClassification").save_pretrained(tmp_path / "tokens")
    with pytest.raises(ConversionError, match="architecture BertForTokenClassification"):
        open_model(tmp_path / "tokens")
    turned = dict(enumerate(reversed(TASKS["MNLI"].labels)))
    for name, changes in (("nameless", {}), ("turned", {"id2label": turned})):
        model = foreign("Bert", "ForSequenceClassification", **changes)
        model.save_pretrained(tmp_path / name)
        with pytest.raises(ConversionError, match=r"id2label = .*QQP: not_duplicate, duplicate"):
            open_model(tmp_path / name)
    path = tmp_path / "tokens" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": {"a": 1}}))
    with pytest.raises(ConversionError, match="architecture None"):
        open_model(tmp_path / "tokens")
