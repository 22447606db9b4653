"""T5: an encoder and a decoder with relative positions in the first layer's table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mtk.convert.probe import PairInputs
from mtk.convert.reference_forward.plain import Weights, activation


def t5(config: Mapping[str, Any], w: Weights, tokens_BS: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits as ``PairProbe`` has them; states after the embedding and each layer of both."""
    inputs = PairInputs.of(tokens_BS)
    states: list[Tensor] = []
    memory = _stack("encoder", config, w, tokens_BS, None, inputs.padding_BS, states)
    out_BTE = _stack("decoder", config, w, inputs.decoder_BS, memory, inputs.padding_BS, states)
    tied = config.get("tie_word_embeddings", True)
    if config.get("scale_decoder_outputs", tied):
        out_BTE = out_BTE * int(config["d_model"]) ** -0.5
    matrix = w["shared.weight"] if tied or "lm_head.weight" not in w else w["lm_head.weight"]
    return out_BTE @ matrix.T, [x[:, : inputs.real] for x in states]


def _stack(
    name: str,
    config: Mapping[str, Any],
    w: Weights,
    tokens_BS: Tensor,
    memory: Tensor | None,
    padding_BS: Tensor,
    states: list[Tensor],
) -> Tensor:
    epsilon = float(config.get("layer_norm_epsilon", 1e-6))
    heads = int(config["num_heads"])
    seen_BT = (padding_BS == 0)[:, None, :]
    size = tokens_BS.shape[1]
    encoding = memory is None
    table = w[f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    own_SS = torch.ones(size, size, dtype=torch.bool)
    visible = seen_BT if encoding else own_SS.tril()[None]

    def norm(x: Tensor, part: str) -> Tensor:
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * w[f"{part}.weight"]

    def attend(x: Tensor, source: Tensor, part: str, positions: bool, mask: Tensor) -> Tensor:
        inputs = {"q": x, "k": source, "v": source}
        q, k, v = (y @ w[f"{part}.{n}.weight"].T for n, y in inputs.items())
        depth = q.shape[-1] // heads
        found = []
        for head in range(heads):
            own = slice(head * depth, (head + 1) * depth)
            scores = q[..., own] @ k[..., own].transpose(1, 2)
            if positions:
                scores = scores + _positions(config, table[:, head], size, both=encoding)
            scores = scores.masked_fill(~mask, -math.inf)
            found.append(torch.softmax(scores, -1) @ v[..., own])
        return torch.cat(found, -1) @ w[f"{part}.o.weight"].T

    x = w["shared.weight"][tokens_BS]
    if encoding:
        states.append(x)
    for i in range(int(config["num_layers"])):
        b = f"{name}.block.{i}.layer"
        y = norm(x, f"{b}.0.layer_norm")
        x = x + attend(y, y, f"{b}.0.SelfAttention", True, visible)
        if memory is not None:
            y = norm(x, f"{b}.1.layer_norm")
            x = x + attend(y, memory, f"{b}.1.EncDecAttention", False, seen_BT)
        last = 1 if encoding else 2
        y = norm(x, f"{b}.{last}.layer_norm")
        x = x + _mlp(config, w, y, f"{b}.{last}.DenseReluDense")
        states.append(x)
    return norm(x, f"{name}.final_layer_norm")


def _mlp(config: Mapping[str, Any], w: Weights, x: Tensor, part: str) -> Tensor:
    kind = str(config.get("feed_forward_proj", "relu"))
    if kind.startswith("gated-"):
        name = kind.removeprefix("gated-")
        act = activation("gelu_new" if name == "gelu" else name)
        inner = act(x @ w[f"{part}.wi_0.weight"].T) * (x @ w[f"{part}.wi_1.weight"].T)
    else:
        inner = activation(kind)(x @ w[f"{part}.wi.weight"].T)
    return inner @ w[f"{part}.wo.weight"].T


def _positions(config: Mapping[str, Any], column_N: Tensor, size: int, *, both: bool) -> Tensor:
    """One head's [S, S]: gap by gap, as the paper's text describes the buckets."""
    total = int(config.get("relative_attention_num_buckets", 32))
    far = int(config.get("relative_attention_max_distance", 128))
    buckets = total // 2 if both else total
    exact = buckets // 2

    def bucket(gap: int) -> int:
        start = 0
        if both:
            start, gap = (buckets if gap < 0 else 0), abs(gap)
        gap = max(gap, 0)
        if gap < exact:
            return start + gap
        # In fp32, as models were trained: borders fall on other distances in fp64.
        ratio = torch.log(torch.tensor(gap, dtype=torch.float32) / exact)
        grown = ratio / math.log(far / exact) * (buckets - exact)
        return start + min(exact + int(grown), buckets - 1)

    numbers = torch.tensor([bucket(gap) for gap in range(1 - size, size)])
    place = torch.arange(size)
    return column_N[numbers[place[:, None] - place[None, :] + size - 1]]
