"""What families with experts share: rules of an MoE layer, and how files may hold experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mtk.config.layer_pattern import shortest_text
from mtk.config.model import ModelConfig
from mtk.convert.gated_decoder import Takes
from mtk.convert.lazy import LazyTensors, Tensors
from mtk.convert.mapping import Rename, Rule, StackExperts

# Options that training alone looks at, or that are looked at through others.
NOT_WRITTEN = (
    "moe_layer_freq",
    "moe_router_load_balancing_type",
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
    "moe_expert_capacity_factor",
    "moe_router_bias_update_rate",
)
# Native part of an expert -> its name there.
Parts = Mapping[str, str]
PLAIN: Parts = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def takes(config: ModelConfig) -> Takes:
    """For ``reasons_against``: experts, and how they are trained."""
    found: Takes = {name: ((getattr(config, name),), "") for name in NOT_WRITTEN}
    experts = () if config.num_experts is None else (config.num_experts,)
    found["num_experts"] = (experts, "has experts")
    found["moe_router_topk"] = ((config.moe_router_topk,), "")
    return found


def normalised_reasons(config: ModelConfig, name: str) -> list[str]:
    """Over one chosen expert a normalised weight is 1 there, whatever the router says."""
    if config.moe_router_topk != 1:
        return []
    return [f"moe_router_topk = 1: {name} gives a single expert the weight 1"]


def layer_freq(layers: list[bool]) -> str:
    """The native option for layers with experts (True) and without."""
    return shortest_text(tuple(layers))


def experts(config: ModelConfig, i: int, mlp: str, parts: Parts = PLAIN) -> list[Rule]:
    """Router and experts of layer ``i``. mlp: what the MoE module is called there."""
    n, h, count = f"layers.{i}.mlp", f"model.layers.{i}.{mlp}", config.num_experts or 0
    return [
        Rename(f"{n}.router.weight", f"{h}.gate.weight"),
        *(
            StackExperts(f"{n}.experts.{native}", f"{h}.experts.{{e}}.{foreign}.weight", count)
            for native, foreign in parts.items()
        ),
    ]


def shared_expert(i: int, foreign: str) -> list[Rule]:
    """The MLP beside the experts of layer ``i``."""
    n, h = f"layers.{i}.mlp.shared", f"model.layers.{i}.mlp.{foreign}"
    return [Rename(f"{n}.{a}.weight", f"{h}.{b}.weight") for a, b in PLAIN.items()]


def unstacked(tensors: Tensors, config: ModelConfig, mlp: str, parts: Parts = PLAIN) -> Tensors:
    """Names of single experts, also for files that hold them stacked with gate and up in one:
    what transformers 5 writes with ``save_original_format=False``."""
    if not any(name.endswith(".mlp.experts.gate_up_proj") for name in tensors):
        return tensors
    places: dict[str, tuple[str, Any]] = {}
    for name in tensors:
        stem, _, kind = name.rpartition(".mlp.experts.")
        if not stem:
            places[name.replace(".mlp.gate.", f".{mlp}.gate.")] = (name, None)
            continue
        half = config.moe_ffn_size
        cuts: dict[str, slice] = {"down": slice(None)}
        if kind == "gate_up_proj":
            cuts = {"gate": slice(None, half), "up": slice(half, None)}
        for expert in range(config.num_experts or 0):
            for part, rows in cuts.items():
                own = f"{stem}.{mlp}.experts.{expert}.{parts[part]}.weight"
                places[own] = (name, (expert, rows))
    held: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        stored, cut = places[name]
        if cut is None:
            return tensors[stored]
        if stored not in held:
            held.clear()
            held[stored] = tensors[stored]
        return held[stored][cut].clone()

    return LazyTensors(places, read)
