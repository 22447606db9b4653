"""Checkpoints of Megatron's legacy BERT, and what it computes, made without mtk."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MegatronBertConfig, MegatronBertForPreTraining

from tests.convert.megatron.checkpoints import HEADS, POSITIONS, ROWS, VOCAB, mixed

WIDTH, INNER = 48, 80
Gelu = Callable[[Tensor], Tensor]


def exact(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def megatron_bert(layers: int = 2, **changes: Any) -> MegatronBertForPreTraining:
    """transformers' Megatron-BERT with odd sizes; every weight matters."""
    torch.manual_seed(4)
    values = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "intermediate_size": INNER,
        "max_position_embeddings": POSITIONS,
        "layer_norm_eps": 1e-5,
    }
    model = MegatronBertForPreTraining(MegatronBertConfig(**(values | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim == 1 else 1.0 if "embeddings" in name else 0.2
            parameter.add_(scale * torch.randn(parameter.shape))
    return model.eval()


def legacy_bert(
    model: MegatronBertForPreTraining,
    *,
    version: int = 0,
    tensor: int = 1,
    pipeline: int = 1,
    dtype: torch.dtype = torch.float32,
    names: tuple[str, str] = ("transformer", "attention"),
) -> dict[tuple[int, int], dict[str, Any]]:
    """The model of each (tensor, pipeline) rank in the nested form of the published BERT-345M."""
    w = {name: value.to(dtype) for name, value in model.state_dict().items()}
    e, p = "bert.embeddings", "cls.predictions"
    words, bias = w[f"{e}.word_embeddings.weight"], w[f"{p}.bias"]
    words = torch.cat((words, torch.randn(ROWS - VOCAB, WIDTH).to(dtype)))
    bias = torch.cat((bias, torch.randn(ROWS - VOCAB).to(dtype)))
    per_stage = model.config.num_hidden_layers // pipeline
    found = {}
    for rank in range(tensor):
        rows = {"weight": words.chunk(tensor)[rank].clone()}
        for stage in range(pipeline):
            block: dict[str, Tensor] = {}
            for layer in range(per_stage):
                block |= _layer(w, stage * per_stage + layer, layer, version, rank, tensor, names)
            language: dict[str, Any] = {names[0]: block}
            whole: dict[str, Any] = {"language_model": language}
            if stage == 0:
                language["embedding"] = {
                    "word_embeddings": rows,
                    "position_embeddings": _both(w, f"{e}.position_embeddings", ("weight",)),
                    "tokentype_embeddings": _both(w, f"{e}.token_type_embeddings", ("weight",)),
                }
            if stage == pipeline - 1:
                block |= _under("final_layernorm", _both(w, "bert.encoder.ln"))
                language["pooler"] = _under("dense", _both(w, "bert.pooler.dense"))
                whole["lm_head"] = {
                    "bias": bias.chunk(tensor)[rank].clone(),
                    **_under("dense", _both(w, f"{p}.transform.dense")),
                    **_under("layernorm", _both(w, f"{p}.transform.LayerNorm")),
                }
                whole["binary_head"] = _both(w, "cls.seq_relationship")
                if pipeline > 1:
                    whole["word_embeddings_for_head"] = rows
            found[rank, stage] = whole
    return found


def _both(
    w: Mapping[str, Tensor], name: str, kinds: tuple[str, ...] = ("weight", "bias")
) -> dict[str, Tensor]:
    return {kind: w[f"{name}.{kind}"].clone() for kind in kinds}


def _under(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{kind}": tensor for kind, tensor in tensors.items()}


def _layer(
    w: Mapping[str, Tensor],
    number: int,
    local: int,
    version: int,
    rank: int,
    ranks: int,
    names: tuple[str, str],
) -> dict[str, Tensor]:
    h, m = f"bert.encoder.layer.{number}", f"layers.{local}"
    own = f"{m}.{names[1]}"
    found = {
        **_under(f"{m}.input_layernorm", _both(w, f"{h}.attention.ln")),
        **_under(f"{m}.post_attention_layernorm", _both(w, f"{h}.ln")),
        f"{own}.dense.weight": w[f"{h}.attention.output.dense.weight"].chunk(ranks, 1)[rank],
        f"{own}.dense.bias": w[f"{h}.attention.output.dense.bias"],
        f"{m}.mlp.dense_h_to_4h.weight": w[f"{h}.intermediate.dense.weight"].chunk(ranks)[rank],
        f"{m}.mlp.dense_h_to_4h.bias": w[f"{h}.intermediate.dense.bias"].chunk(ranks)[rank],
        f"{m}.mlp.dense_4h_to_h.weight": w[f"{h}.output.dense.weight"].chunk(ranks, 1)[rank],
        f"{m}.mlp.dense_4h_to_h.bias": w[f"{h}.output.dense.bias"],
    }
    for kind in ("weight", "bias"):
        parts = [w[f"{h}.attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
        found[f"{own}.query_key_value.{kind}"] = mixed(torch.cat(parts), version, ranks)[rank]
    return {name: tensor.clone() for name, tensor in found.items()}


def bert_args(tensor: int = 1, pipeline: int = 1, layers: int = 2, **changes: Any) -> Namespace:
    """What Megatron 2.x keeps of a BERT's run, as far as the model goes."""
    values: dict[str, Any] = {
        "num_layers": layers,
        "hidden_size": WIDTH,
        "ffn_hidden_size": INNER,
        "num_attention_heads": HEADS,
        "kv_channels": WIDTH // HEADS,
        "seq_length": POSITIONS,
        "max_position_embeddings": POSITIONS,
        "padded_vocab_size": ROWS,
        "make_vocab_size_divisible_by": 128,
        "layernorm_epsilon": 1e-5,
        "bias_gelu_fusion": True,
        "openai_gelu": False,
        "onnx_safe": None,
        "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False,
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "bert_binary_head": True,
        "mask_prob": 0.15,
        "tokenizer_type": "BertWordPieceLowerCase",
    }
    return Namespace(**(values | changes))


def forward(
    model: MegatronBertForPreTraining,
    tokens_BS: Tensor,
    types_BS: Tensor,
    seen_BS: Tensor,
    *,
    mlp: Gelu,
    head: Gelu,
) -> tuple[Tensor, Tensor]:
    """Megatron's BERT in plain torch: logits [B, S, V] of tokens and [B, 2] of the order.

    seen_BS: 1 where a token is no padding. mlp, head: the two places of a gelu.
    """
    w = model.state_dict()
    epsilon = model.config.layer_norm_eps

    def dense(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], epsilon)

    e, p = "bert.embeddings", "cls.predictions"
    words = w[f"{e}.word_embeddings.weight"]
    x_BSE = words[tokens_BS] + w[f"{e}.token_type_embeddings.weight"][types_BS]
    x_BSE = x_BSE + w[f"{e}.position_embeddings.weight"][: tokens_BS.shape[1]]
    for layer in range(model.config.num_hidden_layers):
        h = f"bert.encoder.layer.{layer}"
        y_BSE = norm(x_BSE, f"{h}.attention.ln")
        q, k, v = (
            dense(y_BSE, f"{h}.attention.self.{part}").unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        scores = q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5
        scores = scores.masked_fill(seen_BS[:, None, None, :] == 0, -1e9)
        y_BSE = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x_BSE = x_BSE + dense(y_BSE, f"{h}.attention.output.dense")
        y_BSE = mlp(dense(norm(x_BSE, f"{h}.ln"), f"{h}.intermediate.dense"))
        x_BSE = x_BSE + dense(y_BSE, f"{h}.output.dense")
    x_BSE = norm(x_BSE, "bert.encoder.ln")
    y_BSE = head(dense(x_BSE, f"{p}.transform.dense"))
    logits_BSV = norm(y_BSE, f"{p}.transform.LayerNorm") @ words.T + w[f"{p}.bias"]
    return logits_BSV, dense(
        torch.tanh(dense(x_BSE[:, 0], "bert.pooler.dense")), "cls.seq_relationship"
    )
