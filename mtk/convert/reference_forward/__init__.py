"""Foreign families computed straight from Hugging Face tensors, in the plainest form.

This is the second opinion of the parity check where transformers is not installed. It shares
no code with :mod:`mtk.models` or the conversion tables: it reads the foreign names and
``config.json`` fields itself and writes every formula out, head by head. Slow on purpose.

Shape suffixes in this package: B batch, S sequence, T keys, D channels of a head, E hidden
size, V vocabulary, F frequencies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mtk.convert.reference_forward.bert import bert
from mtk.convert.reference_forward.bloom import bloom
from mtk.convert.reference_forward.gated import gated
from mtk.convert.reference_forward.gpt2 import gpt2
from mtk.convert.reference_forward.gpt_neox import gpt_neox
from mtk.convert.reference_forward.mamba2 import mamba2_forward
from mtk.convert.reference_forward.plain import Weights
from mtk.convert.reference_forward.t5 import t5
from mtk.errors import ConversionError

# Sizes that files may leave out; the formulas themselves know the other settings' defaults.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt_neox": {"hidden_size": 6144, "num_hidden_layers": 44, "num_attention_heads": 64},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 8},
    "mamba2": {
        "num_hidden_layers": 64,
        "num_heads": 128,
        "head_dim": 64,
        "n_groups": 8,
        "state_size": 128,
        "conv_kernel": 4,
    },
}
# Where null is not the same as nothing said.
MEANT = ("sliding_window", "head_dim", "num_key_value_heads", "scale_decoder_outputs")
Forward = Callable[[Mapping[str, Any], Weights, Tensor], tuple[Tensor, list[Tensor]]]


def reference_forward(
    config: Mapping[str, Any], weights: Weights, tokens_BS: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Logits [B, S, V] and the residual stream [B, S, E] after the embedding and each layer.

    config: the content of ``config.json``. weights: by name, fp32 for exact work. Raises
    ConversionError for a family it does not know.
    """
    forwards: dict[str, Forward] = {
        "gpt2": gpt2,
        "llama": gated,
        "mistral": gated,
        "qwen2": gated,
        "qwen3": gated,
        "gemma": gated,
        "mixtral": gated,
        "qwen2_moe": gated,
        "qwen3_moe": gated,
        "glm4_moe": gated,
        "gpt_neox": gpt_neox,
        "bloom": bloom,
        "mamba2": mamba2_forward,
        "bert": bert,
        "megatron-bert": bert,
        "t5": t5,
    }
    kind = config.get("model_type")
    stated = {key: value for key, value in config.items() if value is not None or key in MEANT}
    config = {**DEFAULTS.get(str(kind), {}), **stated}
    if kind not in forwards:
        raise ConversionError(f"no reference forward for model_type {kind!r}")
    with torch.no_grad():
        return forwards[str(kind)](config, weights, tokens_BS)
