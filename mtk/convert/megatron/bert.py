"""Megatron's BERT: what its arguments mean beside those of a GPT, and how its files nest it.

It has biases, learned positions, two kinds of segments and norms first (Shoeybi et al. 2019,
section 5.3). Its files have the names of Megatron 2.2 to core 0.3; the published BERT-345M has
older ones, which :mod:`mtk.convert.megatron.spellings` reads too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from mtk.config.model import ModelConfig
from mtk.convert.family import ForeignConfig

# Beginnings of names -> where a file of a rank keeps what follows.
NESTED = (
    ("embedding.word_embeddings.", ("language_model", "embedding", "word_embeddings")),
    ("embedding.position_embeddings.", ("language_model", "embedding", "position_embeddings")),
    ("embedding.tokentype_embeddings.", ("language_model", "embedding", "tokentype_embeddings")),
    ("decoder.", ("language_model", "encoder")),
    ("pooler.", ("language_model", "pooler")),
    ("lm_head.", ("lm_head",)),
    ("binary_head.", ("binary_head",)),
    ("output_layer.", ("word_embeddings_for_head",)),
)
LEGACY = (
    ("self_attention.linear_qkv", "self_attention.query_key_value"),
    ("self_attention.linear_proj", "self_attention.dense"),
    ("pre_mlp_layernorm", "post_attention_layernorm"),
    ("mlp.linear_fc1", "mlp.dense_h_to_4h"),
    ("mlp.linear_fc2", "mlp.dense_4h_to_h"),
)


def bert_values(found: ForeignConfig, segments: int) -> dict[str, Any]:
    """Of the native configuration, what a GPT has not; complains of what mtk's BERT has not."""
    if not found.get("bert_binary_head", bool, True):
        found.complaints.append(
            "bert_binary_head = False: Megatron's BERT has no embeddings of segments then, which "
            "mtk's has"
        )
    # The head has a gelu of its own, which is never fused with a bias, so that it is exact.
    tanh = found.get("openai_gelu", bool, False)
    return {
        "family": "bert",
        "num_tokentypes": max(segments, 1),
        "bert_head_activation": "gelu-tanh" if tanh else "gelu",
    }


def bert_arguments(config: ModelConfig) -> dict[str, Any]:
    """What Megatron's arguments say of a BERT beside those of a GPT."""
    return {
        "bert_binary_head": True,
        "openai_gelu": config.head_activation == "gelu-tanh",
        "bias_gelu_fusion": (config.activation, config.head_activation) == ("gelu-tanh", "gelu"),
        "layernorm_epsilon": config.norm_epsilon,
        "use_legacy_models": True,
        "transformer_impl": "local",
    }


def unwritable_bert(config: ModelConfig) -> Iterator[str]:
    """What keeps a native BERT from being Megatron's, and would not keep a GPT."""
    head, inner = config.head_activation, config.activation
    if head != "gelu" and (head, inner) != ("gelu-tanh", "gelu-tanh"):
        yield (
            f"bert_head_activation = {head} with activation = {inner}: Megatron has gelu before "
            f"the output matrix, or gelu-tanh there and in the MLPs"
        )


def nested(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """A rank's tensors, by Megatron-core's names, in the dicts of the legacy format."""
    model: dict[str, Any] = {}
    for name, tensor in state.items():
        start, path = next(entry for entry in NESTED if name.startswith(entry[0]))
        inside: dict[str, Any] = model
        for key in path:
            inside = inside.setdefault(key, OrderedDict())
        part = name.removeprefix(start)
        for core, legacy in LEGACY:
            part = part.replace(f".{core}.", f".{legacy}.")
        inside[part] = tensor
    return model
