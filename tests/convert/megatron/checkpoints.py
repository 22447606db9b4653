"""Checkpoints as Megatron writes them, made here without mtk's tables or writer."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

HEADS, POSITIONS, VOCAB, ROWS = 4, 32, 301, 384


def gpt2(layers: int = 2, **changes: Any) -> GPT2LMHeadModel:
    """Hugging Face's GPT-2 with odd sizes; every weight matters."""
    torch.manual_seed(3)
    values = {
        "vocab_size": VOCAB,
        "n_positions": POSITIONS,
        "n_embd": 48,
        "n_layer": layers,
        "n_head": HEADS,
        "n_inner": 80,
        "activation_function": "gelu_new",
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    model = GPT2LMHeadModel(GPT2Config(**(values | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            scale = 0.3 if parameter.ndim == 1 else 1.0 if "wte" in name else 0.15
            parameter.add_(scale * noise)
    return model.eval()


def mixed(fused: Tensor, version: int, ranks: int) -> list[Tensor]:
    """Rows of query, key, value [3 E, ...] as each tensor rank of a version keeps them."""
    rest = fused.shape[1:]
    split = fused.view(3, ranks, HEADS // ranks, -1, *rest)
    found = []
    for rank in range(ranks):
        own = split[:, rank]  # [3, heads of the rank, channels, ...]
        if version == 1:
            own = own.permute(1, 2, 0, *range(3, own.ndim))
        elif version > 1:
            own = own.transpose(0, 1)
        found.append(own.reshape(-1, *rest).clone())
    return found


def legacy(
    model: GPT2LMHeadModel,
    *,
    version: int = 0,
    tensor: int = 1,
    pipeline: int = 1,
    dtype: torch.dtype = torch.float32,
    norms: Sequence[str] = ("input_layernorm", "post_attention_layernorm", "final_layernorm"),
    names: Sequence[str] = ("transformer", "attention"),
) -> dict[tuple[int, int], dict[str, Any]]:
    """The model of each (tensor, pipeline) rank in the nested form of Megatron up to 2.x."""
    weights = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    words = weights["transformer.wte.weight"]
    words = torch.cat((words, torch.randn(ROWS - VOCAB, words.shape[1]).to(dtype)))
    per_stage = model.config.n_layer // pipeline
    found = {}
    for rank in range(tensor):
        rows = words.chunk(tensor)[rank].clone()
        for stage in range(pipeline):
            block: dict[str, Tensor] = {}
            for layer in range(per_stage):
                block |= _layer(
                    weights, stage * per_stage + layer, layer, version, (rank, tensor), norms, names
                )
            language: dict[str, Any] = {names[0]: block}
            whole: dict[str, Any] = {"language_model": language}
            if stage == 0:
                language["embedding"] = {
                    "word_embeddings": {"weight": rows},
                    "position_embeddings": {"weight": weights["transformer.wpe.weight"]},
                }
            if stage == pipeline - 1:
                for kind in ("weight", "bias"):
                    block[f"{norms[2]}.{kind}"] = weights[f"transformer.ln_f.{kind}"]
                if pipeline > 1:
                    whole["word_embeddings_for_head"] = {"weight": rows}
            found[rank, stage] = whole
    return found


def _layer(
    weights: Mapping[str, Tensor],
    number: int,
    local: int,
    version: int,
    rank: tuple[int, int],
    norms: Sequence[str],
    names: Sequence[str],
) -> dict[str, Tensor]:
    own, ranks = rank
    h, m = f"transformer.h.{number}", f"layers.{local}"
    fused = weights[f"{h}.attn.c_attn.weight"].T.contiguous()
    found = {
        f"{m}.{names[1]}.query_key_value.weight": mixed(fused, version, ranks)[own],
        f"{m}.{names[1]}.query_key_value.bias": mixed(
            weights[f"{h}.attn.c_attn.bias"], version, ranks
        )[own],
        f"{m}.{names[1]}.dense.weight": weights[f"{h}.attn.c_proj.weight"].T.chunk(ranks, 1)[own],
        f"{m}.{names[1]}.dense.bias": weights[f"{h}.attn.c_proj.bias"],
        f"{m}.mlp.dense_h_to_4h.weight": weights[f"{h}.mlp.c_fc.weight"].T.chunk(ranks)[own],
        f"{m}.mlp.dense_h_to_4h.bias": weights[f"{h}.mlp.c_fc.bias"].chunk(ranks)[own],
        f"{m}.mlp.dense_4h_to_h.weight": weights[f"{h}.mlp.c_proj.weight"].T.chunk(ranks, 1)[own],
        f"{m}.mlp.dense_4h_to_h.bias": weights[f"{h}.mlp.c_proj.bias"],
    }
    for kind in ("weight", "bias"):
        found[f"{m}.{norms[0]}.{kind}"] = weights[f"{h}.ln_1.{kind}"]
        found[f"{m}.{norms[1]}.{kind}"] = weights[f"{h}.ln_2.{kind}"]
    return {name: tensor.clone() for name, tensor in found.items()}


def legacy_args(model: GPT2LMHeadModel, tensor: int = 1, pipeline: int = 1) -> Namespace:
    """What Megatron 2.x keeps beside the weights, as far as the model goes."""
    return Namespace(
        num_layers=model.config.n_layer,
        hidden_size=model.config.n_embd,
        ffn_hidden_size=model.config.n_inner,
        num_attention_heads=HEADS,
        kv_channels=model.config.n_embd // HEADS,
        seq_length=POSITIONS,
        max_position_embeddings=POSITIONS,
        padded_vocab_size=ROWS,
        make_vocab_size_divisible_by=128,
        layernorm_epsilon=1e-5,
        bias_gelu_fusion=True,
        openai_gelu=False,
        onnx_safe=None,
        apply_query_key_layer_scaling=True,
        apply_residual_connection_post_layernorm=False,
        fp32_residual_connection=False,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        params_dtype=torch.float16,
        num_experts=None,
        bert_binary_head=True,
        lr=1.5e-4,
    )


def save_ranks(
    root: Path,
    models: Mapping[tuple[int, ...], Mapping[str, Any]],
    *,
    args: Namespace | None = None,
    version: float | None = None,
    iteration: int | None = None,
    zipped: bool = True,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint's folder: ``release`` or an iteration, with its tracker."""
    name = "release" if iteration is None else f"iter_{iteration:07d}"
    pipelined = any(number[1:] != (0,) * len(number[1:]) for number in models)
    for number, model in models.items():
        parts = f"{number[0]:02d}" + "".join(f"_{n:03d}" for n in number[1:] if pipelined)
        content: dict[str, Any] = {"iteration": iteration or 0, "model": model, **(extra or {})}
        if args is not None:
            content["args"] = args
        if version is not None:
            content["checkpoint_version"] = version
        path = root / name / f"mp_rank_{parts}" / "model_optim_rng.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    (root / "latest_checkpointed_iteration.txt").write_text(
        "release" if iteration is None else str(iteration)
    )
    return root


def first_file(root: Path) -> Path:
    """The file of the first rank."""
    return min(root.glob("*/mp_rank_*/model_optim_rng.pt"))


def edit(path: Path, change: Any) -> None:
    """Load one rank's file as Megatron does, change it in place, save it."""
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)
