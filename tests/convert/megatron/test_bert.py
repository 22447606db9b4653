"""BERT in Megatron's legacy layout, that of the published BERT-345M: read, cut anew, written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from mtk.checkpoint import load_model, read_model_config
from mtk.config import make
from mtk.config.model import ModelConfig
from mtk.convert.megatron import published
from mtk.convert.megatron.argument_writing import unwritable
from mtk.convert.megatron.open_checkpoint import Given, open_megatron
from mtk.convert.megatron.published import Published, published_arguments
from mtk.errors import ConversionError
from stages.convert import run
from tests.convert.megatron.berts import (
    WIDTH,
    bert_args,
    exact,
    forward,
    legacy_bert,
    megatron_bert,
    tanh,
)
from tests.convert.megatron.checkpoints import (
    HEADS,
    POSITIONS,
    ROWS,
    VOCAB,
    first_file,
    save_ranks,
)
from tests.convert.megatron.natives import assert_same_weights, to_megatron, to_native
from tests.convert.models import convert_config, gpt2_config, quiet

TOKENS_BS = torch.arange(40).view(2, 20) * 7 % VOCAB
TYPES_BS = (torch.arange(20) > 8).long().expand(2, 20)
SEEN_BS = torch.ones(2, 20, dtype=torch.long)
SEEN_BS[1, 15:] = 0


def native_logits(path: Path) -> tuple[Tensor, Tensor]:
    """Of the two heads, by mtk."""
    with torch.no_grad():
        logits, order = load_model(path).model(TOKENS_BS, types=TYPES_BS, documents=SEEN_BS)
    return logits, order


def assert_computes(native: Path, model: Any, **gelus: Any) -> None:
    """That mtk computes what the plain forward does, at real tokens."""
    found = native_logits(native)
    expected = forward(model, TOKENS_BS, TYPES_BS, SEEN_BS, **gelus)
    real = SEEN_BS == 1
    torch.testing.assert_close(found[0][real], expected[0][real], rtol=0, atol=1e-4)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("act", "gelu"), [("gelu", exact), ("gelu_new", tanh)])
def test_the_plain_forward_is_that_of_transformers(act: str, gelu: Any) -> None:
    model = megatron_bert(hidden_act=act)
    with torch.no_grad():
        theirs = model(TOKENS_BS, token_type_ids=TYPES_BS, attention_mask=SEEN_BS)
    ours = forward(model, TOKENS_BS, TYPES_BS, SEEN_BS, mlp=gelu, head=gelu)
    real = SEEN_BS == 1
    torch.testing.assert_close(ours[0][real], theirs[0][real], rtol=0, atol=1e-4)
    torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=1e-4)


def small_published(patch: pytest.MonkeyPatch) -> None:
    arguments = {"num_attention_heads": HEADS, "bias_gelu_fusion": True, "true_vocab_size": VOCAB}
    entry = Published("BERT-tiny", 2, WIDTH, POSITIONS, ROWS, arguments)
    patch.setattr(published, "PUBLISHED", (entry,))


def test_the_published_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No arguments, no version, fp16, before torch 1.6: BERT-345M but for its sizes."""
    small_published(monkeypatch)
    model = megatron_bert().half().float()
    ranks = legacy_bert(model, dtype=torch.float16)
    source = save_ranks(tmp_path / "345m", ranks, zipped=False)
    native = to_native(source, tmp_path / "native")
    assert_computes(native, model, mlp=tanh, head=exact)
    stated = json.loads((native / "parity.json").read_text())["reference"]
    assert "as published: num_attention_heads = 4, bias_gelu_fusion = True" in stated
    with pytest.raises(ConversionError, match=r"bert_head_activation = gelu.*bias_gelu_fusion"):
        run(convert_config(native, tmp_path / "hf"), quiet())
    # As transformers computes it, if a user says so: nothing in the file contradicts.
    args = tmp_path / "args.yaml"
    args.write_text(yaml.safe_dump({"bias_gelu_fusion": False}))
    options = {"megatron_args": str(args), "reference": "transformers"}
    hf = run(convert_config(source, tmp_path / "hf", **options), quiet()).path
    parity = json.loads((hf / "parity.json").read_text())
    assert "transformers" in parity["reference"] and "Megatron" in parity["source"]["reference"]
    again = type(model).from_pretrained(hf, dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name].half(), tensor.half()), name


def test_bert_345m_is_known() -> None:
    sizes = {"num_layers": 24, "hidden_size": 1024, "max_position_embeddings": 512}
    for rows, ids in ((29056, 28996), (30592, 30522)):
        known = published_arguments({**sizes, "padded_vocab_size": rows})
        assert known["num_attention_heads"] == 16 and known["true_vocab_size"] == ids


def test_an_unknown_model_without_arguments_says_what_is_missing(tmp_path: Path) -> None:
    source = save_ranks(tmp_path / "m", legacy_bert(megatron_bert()))
    with pytest.raises(ConversionError) as caught:
        open_megatron(source)
    assert "num_attention_heads is missing" in str(caught.value)
    assert "bias_gelu_fusion is missing" in str(caught.value)


def test_arguments_that_say_nothing_of_the_model(tmp_path: Path) -> None:
    args = bert_args()
    for name in list(vars(args)):
        if name not in ("mask_prob", "tokenizer_type"):
            delattr(args, name)
    model = megatron_bert()
    source = save_ranks(tmp_path / "m", legacy_bert(model), args=args)
    given = Given({"num_attention_heads": HEADS, "bias_gelu_fusion": True}, VOCAB)
    assert open_megatron(source, given).config.ffn_size == 80


@pytest.mark.parametrize(
    ("version", "tensor", "pipeline", "names"),
    [
        (0, 2, 1, ("transformer", "attention")),
        (1, 1, 2, ("transformer", "attention")),
        (2, 2, 2, ("encoder", "attention")),
        (3, 4, 1, ("encoder", "self_attention")),
    ],
)
def test_versions_and_layouts(
    version: int, tensor: int, pipeline: int, names: Any, tmp_path: Path
) -> None:
    model = megatron_bert()
    ranks = legacy_bert(model, version=version, tensor=tensor, pipeline=pipeline, names=names)
    args = bert_args(tensor, pipeline)
    source = save_ranks(tmp_path / "m", ranks, args=args, version=float(version), iteration=5000)
    native = to_native(source, tmp_path / "native", true_vocab_size=VOCAB)
    assert_computes(native, model, mlp=tanh, head=exact)


@pytest.mark.parametrize(
    ("args", "gelus"),
    [
        ({"bias_gelu_fusion": False, "onnx_safe": True}, {"mlp": exact, "head": exact}),
        ({"openai_gelu": True, "bias_gelu_fusion": False}, {"mlp": tanh, "head": tanh}),
    ],
    ids=["exact", "tanh"],
)
def test_which_gelu(args: dict[str, Any], gelus: Any, tmp_path: Path) -> None:
    model = megatron_bert()
    source = save_ranks(tmp_path / "m", legacy_bert(model), args=bert_args(**args))
    native = to_native(source, tmp_path / "native", true_vocab_size=VOCAB)
    assert_computes(native, model, **gelus)
    again = to_megatron(native, tmp_path / "again", 1, 1)
    assert read_model_config(to_native(again, tmp_path / "b")) == read_model_config(native)


def test_to_another_layout_and_back(tmp_path: Path) -> None:
    """4 x 1 with the order of version 1 -> 2 x 2 -> 1 x 1: the published names, the same bits."""
    model = megatron_bert()
    ranks = legacy_bert(model, version=1, tensor=4)
    source = save_ranks(tmp_path / "m", ranks, args=bert_args(4), version=1.0)
    options = {"true_vocab_size": VOCAB}
    native = to_native(source, tmp_path / "native", **options)
    middle = to_megatron(source, tmp_path / "2x2", 2, 2, **options)
    one = to_megatron(middle, tmp_path / "1x1", 1, 1)
    parity = json.loads((one / "parity.json").read_text())
    assert parity["passed"] and parity["round_trip_bit_equal"] and parity["source"]["passed"]
    back = to_native(one, tmp_path / "back")
    assert read_model_config(back) == read_model_config(native)
    assert read_model_config(back).bert_head_activation == "gelu"
    for path in (middle, one):
        assert_same_weights(native, to_native(path, path.with_suffix(".native")), ("output_bias",))
    written = torch.load(first_file(one), weights_only=False)
    assert written["checkpoint_version"] == 3.0 and written["args"].bert_binary_head is True
    assert written["args"].bias_gelu_fusion and not written["args"].openai_gelu
    expected = legacy_bert(model, version=3, names=("encoder", "self_attention"))[0, 0]
    assert_nested(written["model"], expected)
    last = torch.load(middle / "release/mp_rank_01_001/model_optim_rng.pt", weights_only=False)
    assert set(last["model"]) == {
        "language_model",
        "lm_head",
        "binary_head",
        "word_embeddings_for_head",
    }


def assert_nested(found: Any, expected: Any, name: str = "model") -> None:
    """The same dicts of the same tensors, but for padding."""
    if isinstance(expected, dict):
        assert set(found) == set(expected), name
        for key in expected:
            assert_nested(found[key], expected[key], f"{name}.{key}")
        return
    rows = VOCAB if found.shape[0] == ROWS else None
    assert found.shape == expected.shape and torch.equal(found[:rows], expected[:rows]), name


def test_from_transformers_and_back(tmp_path: Path) -> None:
    model = megatron_bert(hidden_act="gelu_new")
    model.save_pretrained(tmp_path / "hf")
    made = to_megatron(tmp_path / "hf", tmp_path / "m", 2, 1)
    args = torch.load(first_file(made), weights_only=False)["args"]
    assert args.openai_gelu is True and args.bias_gelu_fusion is False
    back = run(convert_config(made, tmp_path / "back", reference="transformers"), quiet()).path
    again = type(model).from_pretrained(back)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


UNWRITABLE = [
    ({"activation": "relu"}, "activation = relu"),
    ({"activation": "gelu", "bert_head_activation": "gelu-tanh"}, "bert_head_activation"),
    ({"norm_placement": "post"}, "norm_placement = 'post'"),
    ({"bert_binary_head": False}, "bert_binary_head = False"),
    ({"num_tokentypes": 3}, "num_tokentypes = 3"),
]


@pytest.mark.parametrize(("changes", "reason"), UNWRITABLE, ids=str)
def test_models_megatron_has_not(changes: Any, reason: str) -> None:
    config = gpt2_config(family="bert", bert_head_activation="gelu")
    assert not list(unwritable(config))
    found = list(unwritable(make(ModelConfig, **{**vars(config), **changes})))
    assert len(found) == 1 and found[0].startswith(reason)


BROKEN: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no pooler": (lambda m: m["language_model"].pop("pooler"), {}, "missing: pooler.dense"),
    "no head": (lambda m: m.pop("lm_head"), {}, r"missing: lm_head\.bias"),
    "no segments": (
        lambda m: m["language_model"]["embedding"].pop("tokentype_embeddings"),
        {},
        "missing: embedding.tokentype_embeddings",
    ),
    "segments without a shape": (
        lambda m: m["language_model"]["embedding"].update(
            tokentype_embeddings={"weight": torch.ones(())}
        ),
        {},
        r"tokentype_embeddings.weight has shape \[\]",
    ),
    "a head of a task": (
        lambda m: m.update(classification_head={"weight": torch.ones(3, WIDTH)}),
        {},
        "without a place: classification_head.weight",
    ),
    "no binary head": (lambda m: None, {"bert_binary_head": False}, "bert_binary_head = False"),
    "norms around zero": (lambda m: None, {"apply_layernorm_1p": True}, "apply_layernorm_1p"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_refused(name: str, tmp_path: Path) -> None:
    change, args, message = BROKEN[name]
    ranks = legacy_bert(megatron_bert())
    change(ranks[0, 0])
    source = save_ranks(tmp_path / "m", ranks, args=bert_args(**args))
    with pytest.raises(ConversionError, match=message):
        open_megatron(source)
