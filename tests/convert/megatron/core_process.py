"""Megatron-core's own GPTModel on the CPU, in a process of its own.

``python -m tests.convert.megatron.core_process FOLDER``: for each ``FOLDER/NAME.json`` with
a model's sizes, builds the model of Megatron's local layers. With ``NAME/`` beside it, that
checkpoint is loaded strictly; else the model's random weights are saved as one, as Megatron
would. Its logits of the fixed tokens go to ``NAME.pt``.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

TOKENS_BS = torch.arange(40).view(2, 20) * 7 % 300


def build(sizes: dict[str, Any]) -> Any:
    """GPTModel for arguments of Megatron's command line."""
    from megatron.core.activations import squared_relu
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    activation = F.silu if sizes["swiglu"] else squared_relu if sizes["squared_relu"] else F.gelu
    experts = {}
    if sizes["num_experts"] is not None:
        experts = {
            "num_moe_experts": sizes["num_experts"],
            "moe_router_topk": sizes["moe_router_topk"],
            "moe_router_pre_softmax": sizes["moe_router_pre_softmax"],
            "moe_ffn_hidden_size": sizes["moe_ffn_hidden_size"],
            "moe_layer_freq": sizes["moe_layer_freq"],
            "moe_router_score_function": sizes["moe_router_score_function"],
            "moe_router_enable_expert_bias": sizes["moe_router_enable_expert_bias"],
            "moe_router_num_groups": sizes["moe_router_num_groups"],
            "moe_router_group_topk": sizes["moe_router_group_topk"],
            "moe_router_topk_scaling_factor": sizes["moe_router_topk_scaling_factor"],
            "moe_shared_expert_intermediate_size": sizes["moe_shared_expert_intermediate_size"],
            "moe_shared_expert_gate": sizes["moe_shared_expert_gate"],
        }
    config = TransformerConfig(
        num_layers=sizes["num_layers"],
        hidden_size=sizes["hidden_size"],
        ffn_hidden_size=sizes["ffn_hidden_size"],
        num_attention_heads=sizes["num_attention_heads"],
        num_query_groups=sizes["num_query_groups"],
        kv_channels=sizes["kv_channels"],
        normalization=sizes["normalization"],
        layernorm_epsilon=sizes["norm_epsilon"],
        add_bias_linear=sizes["add_bias_linear"],
        add_qkv_bias=sizes["add_qkv_bias"],
        qk_layernorm=sizes["qk_layernorm"],
        window_size=sizes["window_size"],
        rotary_interleaved=sizes["rotary_interleaved"],
        gated_linear_unit=sizes["swiglu"],
        activation_func=activation,
        bias_activation_fusion=sizes["bias_gelu_fusion"],
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        params_dtype=torch.float32,
        **experts,
    )
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=sizes["normalization"]
    )
    model = GPTModel(
        config,
        spec,
        vocab_size=sizes["padded_vocab_size"],
        max_sequence_length=sizes["max_position_embeddings"],
        position_embedding_type=sizes["position_embedding_type"],
        rotary_percent=sizes["rotary_percent"],
        rotary_base=sizes["rotary_base"],
        rope_scaling=sizes["use_rope_scaling"],
        share_embeddings_and_output_weights=not sizes["untie_embeddings_and_output_weights"],
    )
    return model.eval()


def loud(model: Any) -> None:
    """Every weight matters."""
    torch.manual_seed(5)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape)
        parameter.add_(0.3 * noise if parameter.ndim == 1 else 0.2 * noise)


def main(folder: Path) -> None:
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    ones = torch.ones
    # Masks of windows are made on "cuda".
    torch.ones = lambda *args, device=None, **kwargs: ones(*args, **kwargs)  # type: ignore[assignment]
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.transformer.moe import moe_utils

    # Without Transformer Engine megatron-core 0.16 asks for a name it never bound.
    moe_utils.te_general_gemm = None
    tracker = tensor_parallel.get_cuda_rng_tracker()
    type(tracker).fork = lambda *args: contextlib.nullcontext()  # type: ignore[method-assign]
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    positions = torch.arange(TOKENS_BS.shape[1])[None].expand(2, -1)
    future = torch.ones(20, 20).triu(1).bool()[None, None]
    for path in sorted(folder.glob("*.json")):
        sizes = json.loads(path.read_text())
        model = build(sizes)
        checkpoint = folder / path.stem
        if checkpoint.is_dir():
            files = list(checkpoint.glob("release/mp_rank_00/model_optim_rng.pt"))
            model.load_state_dict(torch.load(files[0], weights_only=False)["model"], strict=True)
        else:
            loud(model)
            content = {"args": Namespace(**sizes), "checkpoint_version": 3.0, "iteration": 9}
            made = checkpoint / "iter_0000009" / "mp_rank_00" / "model_optim_rng.pt"
            made.parent.mkdir(parents=True)
            torch.save(content | {"model": model.state_dict_for_save_checkpoint()}, made)
            (checkpoint / "latest_checkpointed_iteration.txt").write_text("9")
        torch.save(model(TOKENS_BS, positions, future), folder / f"{path.stem}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        main(Path(sys.argv[1]))
