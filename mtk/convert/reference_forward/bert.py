"""BERT, norms last (``bert``) or first (``megatron-bert``)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mtk.convert.probe import SegmentInputs, with_order
from mtk.convert.reference_forward.plain import Weights, activation, affine, layer_norm


def bert(config: Mapping[str, Any], w: Weights, tokens_BS: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits as ``SegmentProbe`` has them, and states after the embedding and each layer."""
    act = activation(str(config.get("hidden_act", "gelu")))
    first = config["model_type"] == "megatron-bert"
    epsilon = float(config.get("layer_norm_eps", 1e-12))
    inputs = SegmentInputs.of(tokens_BS, int(config.get("type_vocab_size", 2)))

    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, w, name, epsilon)

    def project(x: Tensor, name: str) -> Tensor:
        return affine(x, w, name, bias=True)

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
        return project(act(project(x, f"{name}.intermediate.dense")), f"{name}.output.dense")

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
    states = [x[:, : inputs.real] for x in states]
    task = str(config["architectures"][0])
    pooled = None
    if not task.endswith("ForMaskedLM"):
        pooled = torch.tanh(project(x_BSE[:, 0], "bert.pooler.dense"))
    if pooled is not None and not task.endswith("ForPreTraining"):
        return project(pooled, "classifier")[:, None], states
    p = "cls.predictions"
    hidden = norm(act(project(x_BSE, f"{p}.transform.dense")), f"{p}.transform.LayerNorm")
    logits = hidden @ w[f"{e}.word_embeddings.weight"].T + w[f"{p}.bias"]
    order = None if pooled is None else project(pooled, "cls.seq_relationship")
    return with_order(logits, order, inputs.real), states
