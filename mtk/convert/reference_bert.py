"""BERT computed straight from Hugging Face tensors, in the plainest form.

Second opinion of the parity check, as :mod:`mtk.convert.reference_forward` is for decoders.
Shape suffixes: B batch, S sequence, E hidden size, D channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mtk.convert.probe import SegmentInputs, with_order

Weights = Mapping[str, Tensor]


def bert_forward(
    config: Mapping[str, Any],
    w: Weights,
    tokens_BS: Tensor,
    activation: Callable[[Tensor], Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """Logits as ``SegmentProbe`` has them, and states after the embedding and each layer."""
    first = config["model_type"] == "megatron-bert"
    epsilon = float(config.get("layer_norm_eps", 1e-12))
    inputs = SegmentInputs.of(tokens_BS)

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        scaled = centred / torch.sqrt(centred.pow(2).mean(dim=-1, keepdim=True) + epsilon)
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def project(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def attend(x: Tensor, name: str) -> Tensor:
        q, k, v = (project(x, f"{name}.self.{part}") for part in ("query", "key", "value"))
        heads = int(config["num_attention_heads"])
        depth = q.shape[-1] // heads
        seen = inputs.padding_BS[:, None, :] == 0
        parts = []
        for head in range(heads):
            own = slice(head * depth, (head + 1) * depth)
            scores = q[..., own] @ k[..., own].transpose(1, 2) / math.sqrt(depth)
            scores = scores.masked_fill(~seen, -math.inf)
            parts.append(torch.softmax(scores, dim=-1) @ v[..., own])
        return project(torch.cat(parts, dim=-1), f"{name}.output.dense")

    def mlp(x: Tensor, name: str) -> Tensor:
        return project(activation(project(x, f"{name}.intermediate.dense")), f"{name}.output.dense")

    e = "bert.embeddings"
    x_BSE = w[f"{e}.word_embeddings.weight"][tokens_BS]
    x_BSE = x_BSE + w[f"{e}.token_type_embeddings.weight"][inputs.types_BS]
    x_BSE = x_BSE + w[f"{e}.position_embeddings.weight"][: tokens_BS.shape[1]]
    x_BSE = x_BSE if first else norm(x_BSE, f"{e}.LayerNorm")
    states = [x_BSE]
    for i in range(int(config["num_hidden_layers"])):
        h = f"bert.encoder.layer.{i}"
        if first:
            x_BSE = x_BSE + attend(norm(x_BSE, f"{h}.attention.ln"), f"{h}.attention")
            x_BSE = x_BSE + mlp(norm(x_BSE, f"{h}.ln"), h)
        else:
            attended = attend(x_BSE, f"{h}.attention")
            x_BSE = norm(x_BSE + attended, f"{h}.attention.output.LayerNorm")
            x_BSE = norm(x_BSE + mlp(x_BSE, h), f"{h}.output.LayerNorm")
        states.append(x_BSE)
    x_BSE = norm(x_BSE, "bert.encoder.ln") if first else x_BSE
    p = "cls.predictions"
    hidden = norm(activation(project(x_BSE, f"{p}.transform.dense")), f"{p}.transform.LayerNorm")
    logits = hidden @ w[f"{e}.word_embeddings.weight"].T + w[f"{p}.bias"]
    order = None
    if str(config["architectures"][0]).endswith("ForPreTraining"):
        pooled = torch.tanh(project(x_BSE[:, 0], "bert.pooler.dense"))
        order = project(pooled, "cls.seq_relationship")
    return with_order(logits, order, inputs.real), [x[:, : inputs.real] for x in states]
