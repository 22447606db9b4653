"""GPT-2 and Llama computed straight from Hugging Face tensors, in the plainest form.

This is the second opinion of the parity check where transformers is not installed. It
shares no code with :mod:`mtk.models` or the conversion tables: it reads the foreign
names and ``config.json`` fields itself and writes every formula out. Slow on purpose.

Shape suffixes: B batch, S sequence, T keys, H query heads, G key/value heads, D channels of
a head, E hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mtk.convert.reference_mamba2 import mamba2_forward
from mtk.errors import ConversionError

Weights = Mapping[str, Tensor]
Forward = Callable[[Mapping[str, Any], Weights, Tensor], tuple[Tensor, list[Tensor]]]


def reference_forward(
    config: Mapping[str, Any], weights: Weights, tokens_BS: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Logits [B, S, V] and the residual stream [B, S, E] after the embedding and each layer.

    config: the content of ``config.json``. weights: by name, fp32 for exact work.
    """
    forwards: dict[str, Forward] = {"gpt2": _gpt2, "llama": _llama, "mamba2": mamba2_forward}
    kind = config.get("model_type")
    if kind not in forwards:
        raise ConversionError(f"no reference forward for model_type {kind!r}")
    with torch.no_grad():
        return forwards[str(kind)](config, weights, tokens_BS)


def _causal_softmax(scores: Tensor) -> Tensor:
    size = scores.shape[-1]
    future = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu(1)
    return torch.softmax(scores.masked_fill(future, -math.inf), dim=-1)


def _gpt2(config: Mapping[str, Any], w: Weights, tokens_BS: Tensor) -> tuple[Tensor, list[Tensor]]:
    width, heads = int(config["n_embd"]), int(config["n_head"])
    epsilon = float(config.get("layer_norm_epsilon", 1e-5))
    act = _activation(str(config.get("activation_function", "gelu_new")))
    depth = width // heads

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        variance = centred.pow(2).mean(dim=-1, keepdim=True)
        return centred / torch.sqrt(variance + epsilon) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def conv(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    x_BSE = w["transformer.wte.weight"][tokens_BS]
    x_BSE = x_BSE + w["transformer.wpe.weight"][: tokens_BS.shape[1]]
    states = [x_BSE]
    for i in range(int(config["n_layer"])):
        h = f"transformer.h.{i}"
        mixed = conv(norm(x_BSE, f"{h}.ln_1"), f"{h}.attn.c_attn")
        parts = []
        for head in range(heads):
            q, k, v = (
                mixed[..., part * width + head * depth : part * width + (head + 1) * depth]
                for part in range(3)
            )
            weights_BST = _causal_softmax(q @ k.transpose(1, 2) / math.sqrt(depth))
            parts.append(weights_BST @ v)
        x_BSE = x_BSE + conv(torch.cat(parts, dim=-1), f"{h}.attn.c_proj")
        inner = act(conv(norm(x_BSE, f"{h}.ln_2"), f"{h}.mlp.c_fc"))
        x_BSE = x_BSE + conv(inner, f"{h}.mlp.c_proj")
        states.append(x_BSE)
    output = w["transformer.wte.weight"] if _tied(config, True) else w["lm_head.weight"]
    return norm(x_BSE, "transformer.ln_f") @ output.T, states


def _llama(config: Mapping[str, Any], w: Weights, tokens_BS: Tensor) -> tuple[Tensor, list[Tensor]]:
    heads = int(config["num_attention_heads"])
    groups = int(config.get("num_key_value_heads") or heads)
    depth = int(config.get("head_dim") or config["hidden_size"] // heads)
    epsilon = float(config.get("rms_norm_eps", 1e-6))
    angles = _angles(config, depth, tokens_BS.shape[1], tokens_BS.device)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt(x.pow(2).mean(dim=-1, keepdim=True) + epsilon) * w[f"{name}.weight"]

    def project(x: Tensor, name: str, flag: str) -> Tensor:
        y = x @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if config.get(flag) else y

    def turn(x_BSD: Tensor) -> Tensor:
        # Channel pairs (c, c + D/2) are points of a plane, turned by position x frequency.
        point = torch.complex(x_BSD[..., : depth // 2], x_BSD[..., depth // 2 :])
        turned = point * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((turned.real, turned.imag), dim=-1)

    x_BSE = w["model.embed_tokens.weight"][tokens_BS]
    states = [x_BSE]
    for i in range(int(config["num_hidden_layers"])):
        a, m = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        y = norm(x_BSE, f"model.layers.{i}.input_layernorm")
        q, k, v = (project(y, f"{a}.{name}_proj", "attention_bias") for name in "qkv")
        parts = []
        for head in range(heads):
            group = head // (heads // groups)
            own, shared = (slice(n * depth, (n + 1) * depth) for n in (head, group))
            scores = turn(q[..., own]) @ turn(k[..., shared]).transpose(1, 2) / math.sqrt(depth)
            parts.append(_causal_softmax(scores) @ v[..., shared])
        attended = project(torch.cat(parts, dim=-1), f"{a}.o_proj", "attention_bias")
        x_BSE = x_BSE + attended
        y = norm(x_BSE, f"model.layers.{i}.post_attention_layernorm")
        gate = project(y, f"{m}.gate_proj", "mlp_bias")
        inner = gate * torch.sigmoid(gate) * project(y, f"{m}.up_proj", "mlp_bias")
        x_BSE = x_BSE + project(inner, f"{m}.down_proj", "mlp_bias")
        states.append(x_BSE)
    tied = _tied(config, False)
    output = w["model.embed_tokens.weight"] if tied else w["lm_head.weight"]
    return norm(x_BSE, "model.norm") @ output.T, states


def _angles(config: Mapping[str, Any], depth: int, length: int, device: torch.device) -> Tensor:
    rope = config.get("rope_parameters") or {}
    base = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    # fp32 throughout, as models are trained: exact angles would differ from any of them.
    exponents = torch.arange(0, depth, 2, device=device).float() / depth
    positions = torch.arange(length, device=device).float()
    return positions[:, None] * (1.0 / base**exponents)


def _tied(config: Mapping[str, Any], default: bool) -> bool:
    value = config.get("tie_word_embeddings")
    return default if value is None else bool(value)


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    def tanh_gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

    kinds: dict[str, Callable[[Tensor], Tensor]] = {
        "gelu_new": tanh_gelu,
        "gelu_pytorch_tanh": tanh_gelu,
        "gelu_fast": tanh_gelu,
        "gelu": gelu,
        "relu": torch.relu,
        "relu2": lambda x: torch.relu(x).pow(2),
    }
    if name not in kinds:
        raise ConversionError(f"no reference for activation_function {name!r}")
    return kinds[name]
