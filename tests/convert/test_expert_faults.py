"""Seeded faults of converters of experts are refused with exit code 5, and so are files in which
experts are missing, left over or of another shape."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtk.config.model import ModelConfig
from mtk.convert import families
from mtk.convert.families import FAMILIES, family_for
from mtk.convert.mapping import Rule, StackExperts
from mtk.convert.open_model import open_model
from mtk.errors import ConversionError, GateError, MtkError
from stages.convert import run
from tests.convert.faults import Fault, config_fault, lost, permuted, shifted, swapped, table_fault
from tests.convert.models import convert_config, llama, quiet, save_native

EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    # As wide as the hidden size: a transposed matrix fits.
    "ffn_hidden_size": 32,
    "untie_embeddings_and_output_weights": True,
}
CONFIGS: dict[str, ModelConfig] = {
    "mixtral": llama(**EXPERTS),
    "qwen2_moe": llama(
        **EXPERTS,
        add_qkv_bias=True,
        moe_shared_expert_intermediate_size=24,
        moe_shared_expert_gate=True,
    ),
    "glm4_moe": llama(
        **{**EXPERTS, "num_experts": 8},
        moe_router_topk=4,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_topk_scaling_factor=1.8,
        moe_router_num_groups=4,
        moe_router_group_topk=2,
        moe_shared_expert_intermediate_size=32,
        moe_layer_freq="[0]+[1]",
    ),
}


@dataclass(frozen=True)
class Shuffled(StackExperts):
    """Experts in another order on the foreign side; undone on the way back."""

    order: Callable[[int], Tensor] = shifted

    def to_foreign(self, native: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return super().to_foreign([native[0][self.order(self.experts)]])

    def to_native(self, foreign: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (super().to_native(foreign)[0][self.order(self.experts).argsort()],)


@dataclass(frozen=True)
class Turned(StackExperts):
    """Each expert transposed."""

    def to_foreign(self, native: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return super().to_foreign([native[0].transpose(1, 2)])

    def to_native(self, foreign: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (super().to_native(foreign)[0].transpose(1, 2).contiguous(),)


def stacks(part: str, change: Callable[[StackExperts], Rule]) -> Fault:
    """Rules of experts are made anew."""

    def changed(rule: Rule) -> Rule:
        chosen = isinstance(rule, StackExperts) and rule.native.endswith(part)
        return change(rule) if chosen and isinstance(rule, StackExperts) else rule

    return table_fault(changed)


def shuffled(order: Callable[[int], Tensor]) -> Callable[[StackExperts], Rule]:
    return lambda rule: Shuffled(rule.native, rule.foreign, rule.experts, order)


def swapped_parts(first: str, second: str) -> Fault:
    def changed(rule: StackExperts) -> StackExperts:
        stem, _, part = rule.native.rpartition(".")
        other = {first: second, second: first}.get(part, part)
        return replace(rule, native=f"{stem}.{other}")

    return stacks("", changed)


def of_the_other_layer(rule: StackExperts) -> StackExperts:
    _, number, rest = rule.native.split(".", 2)
    return replace(rule, native=f"layers.{1 - int(number)}.{rest}")


def two_swapped(count: int) -> Tensor:
    order = torch.arange(count)
    order[[1, 2]] = order[[2, 1]]
    return order


FAULTS: dict[str, tuple[str, Fault]] = {
    "experts off by one": ("mixtral", stacks("", shuffled(shifted))),
    "down projections of the next expert": ("mixtral", stacks("down", shuffled(shifted))),
    "two experts swapped": ("mixtral", stacks("", shuffled(two_swapped))),
    "w1 and w3 swapped": ("mixtral", swapped_parts("gate", "up")),
    "w1 transposed": ("mixtral", stacks("gate", lambda r: Turned(r.native, r.foreign, r.experts))),
    "w2 transposed": ("mixtral", stacks("down", lambda r: Turned(r.native, r.foreign, r.experts))),
    "experts of another layer": ("mixtral", stacks("", of_the_other_layer)),
    "router rows permuted": ("mixtral", permuted("router.weight", shifted)),
    "routers of another layer": ("mixtral", swapped("layers.0.mlp.router", "layers.1.mlp.router")),
    "one expert more chosen": (
        "mixtral",
        config_fault({"num_experts_per_tok": 3}, {"moe_router_topk": 3}),
    ),
    "weights not normalised": (
        "qwen2_moe",
        config_fault({"norm_topk_prob": False}, {"moe_router_pre_softmax": True}),
    ),
    "shared expert's gate and up swapped": ("qwen2_moe", swapped("shared.gate", "shared.up")),
    "shared expert missing": ("qwen2_moe", lost("shared.down.weight", 0.0)),
    "gate of the shared expert closed": ("qwen2_moe", lost("token_gate.weight", 0.0)),
    "biases of experts dropped": ("glm4_moe", lost("router.expert_bias", 0.0)),
    "biases of experts off by one": ("glm4_moe", permuted("router.expert_bias", shifted)),
    "scaling factor left out": (
        "glm4_moe",
        config_fault({"routed_scaling_factor": 1.0}, {"moe_router_topk_scaling_factor": None}),
    ),
    "groups left out": (
        "glm4_moe",
        config_fault(
            {"n_group": 1, "topk_group": 1},
            {"moe_router_num_groups": None, "moe_router_group_topk": None},
        ),
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """By family: a native checkpoint, and the directory made of it."""
    found = {}
    for kind, config in CONFIGS.items():
        folder = tmp_path_factory.mktemp(kind)
        native = save_native(folder / "native", config, tokenizer=False)
        found[kind] = (native, run(convert_config(native, folder / "hf"), quiet()).path)
    return found


@pytest.mark.parametrize("kind", CONFIGS)
def test_each_family_holds_its_model(kind: str, folders: dict[str, tuple[Path, Path]]) -> None:
    assert family_for(CONFIGS[kind]).model_type == kind
    native, foreign = folders[kind]
    ids = torch.arange(20)[None]
    assert torch.equal(open_model(native).model(ids), open_model(foreign).model(ids))


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_refused_both_ways(
    name: str,
    folders: dict[str, tuple[Path, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind, fault = FAULTS[name]
    faulty = tuple(fault(f) if f.model_type == kind else f for f in families.FAMILIES)
    monkeypatch.setattr(families, "FAMILIES", faulty)
    native, foreign = folders[kind]
    for load, to in ((native, "hf"), (foreign, "native")):
        with pytest.raises(GateError, match="first difference") as caught:
            run(convert_config(load, tmp_path / to, to=to), quiet())
        assert caught.value.exit_code == 5
    assert list(tmp_path.iterdir()) == []


# -- reasons and bad files ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"moe_layer_freq": "2"}, ["not MixtralForCausalLM", "moe_layer_freq = 2"]),
        ({"moe_router_topk": 1}, ["moe_router_topk = 1: Mixtral gives a single expert"]),
        (
            {"moe_shared_expert_intermediate_size": 24},
            [
                "moe_shared_expert_intermediate_size = 24: Mixtral has nothing",
                "moe_shared_expert_gate = False: Qwen2-MoE gates its shared expert",
                "qk_layernorm = False: Qwen3-MoE has norms",
            ],
        ),
        (
            {"moe_router_score_function": "sigmoid"},
            [
                "moe_router_enable_expert_bias = False: GLM-4-MoE has biases",
                "moe_router_score_function = sigmoid: Mixtral",
                "num_experts = 4: Llama is dense",
            ],
        ),
        ({"add_qkv_bias": True}, ["add_qkv_bias = True", "Mixtral has them in no part"]),
    ],
    ids=str,
)
def test_every_reason_of_every_family(changes: dict[str, Any], expected: list[str]) -> None:
    text = ""
    for family in FAMILIES:
        with pytest.raises(ConversionError) as caught:
            family_for(llama(**{**EXPERTS, **changes}), family.model_type)
        text += str(caught.value)
    assert all(part in text for part in expected), text


Tensors = dict[str, Tensor]
GATE_0 = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"


def _without(tensors: Tensors) -> None:
    del tensors[GATE_0.format(3)]


def _one_more(tensors: Tensors) -> None:
    tensors[GATE_0.format(4)] = tensors[GATE_0.format(0)].clone()


def _narrow(tensors: Tensors) -> None:
    tensors[GATE_0.format(2)] = tensors[GATE_0.format(2)][:-1].contiguous()


def _of_another_type(tensors: Tensors) -> None:
    tensors[GATE_0.format(1)] = tensors[GATE_0.format(1)].bfloat16()


def _all_narrow(tensors: Tensors) -> None:
    for expert in range(4):
        tensors[GATE_0.format(expert)] = tensors[GATE_0.format(expert)][:-8].contiguous()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_without, ["1 missing", GATE_0.format(3)]),
        (_one_more, ["1 without a place", GATE_0.format(4)]),
        (_narrow, [GATE_0.format(2), "[31, 32]", "experts are alike"]),
        (_of_another_type, [GATE_0.format(1), "bfloat16"]),
        (_all_narrow, ["layers.0.mlp.experts.gate", "[4, 24, 32]"]),
    ],
    ids=["missing", "one more", "narrow", "of another type", "all narrow"],
)
def test_files_that_do_not_hold_all_experts(
    change: Callable[[Tensors], None],
    expected: list[str],
    folders: dict[str, tuple[Path, Path]],
    tmp_path: Path,
) -> None:
    tensors = load_file(folders["mixtral"][1] / "model.safetensors")
    change(tensors)
    bad = tmp_path / "bad"
    bad.mkdir()
    save_file(tensors, bad / "model.safetensors")
    text = (folders["mixtral"][1] / "config.json").read_text()
    (bad / "config.json").write_text(text)
    with pytest.raises(MtkError) as caught:
        run(convert_config(bad, tmp_path / "out", to="native"), quiet())
    assert all(part in str(caught.value) for part in expected), str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1"),
        ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok = 1"),
        ("mixtral", {"num_experts_per_tok": 5}, "moe_router_topk = 5"),
        ("mixtral", {"num_local_experts": "4"}, "num_local_experts = '4' is not of type int"),
        ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("qwen2_moe", {"norm_topk_prob": True, "num_experts_per_tok": 1}, "norm_topk_prob with"),
        ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step = 0"),
        ("qwen2_moe", {"mlp_only_layers": [0, 1]}, "gives no layer any experts"),
        ("glm4_moe", {"norm_topk_prob": False}, "norm_topk_prob = False"),
        ("glm4_moe", {"topk_group": 4}, "topk_group = 4"),
        ("glm4_moe", {"n_group": 3}, "moe_router_num_groups = 3"),
    ],
    ids=str,
)
def test_configurations_that_are_refused(
    kind: str,
    changes: dict[str, Any],
    expected: str,
    folders: dict[str, tuple[Path, Path]],
    tmp_path: Path,
) -> None:
    foreign = folders[kind][1]
    data = json.loads((foreign / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(data))
    (tmp_path / "model.safetensors").write_bytes((foreign / "model.safetensors").read_bytes())
    with pytest.raises(ConversionError) as caught:
        open_model(tmp_path)
    assert expected in str(caught.value) and "config.json" in str(caught.value)


def test_biases_of_experts_are_never_rounded(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    native, _ = folders["glm4_moe"]
    path = run(convert_config(native, tmp_path / "hf", dtype="bf16"), quiet()).path
    biases = {n: t for n, t in load_file(path / "model.safetensors").items() if "correction" in n}
    assert biases and all(t.dtype == torch.float32 for t in biases.values())
    opened = open_model(path, dtype=torch.bfloat16).model
    kept = opened.layers["1"].mlp.router.expert_bias  # type: ignore[union-attr]
    assert torch.equal(kept, next(iter(biases.values())))  # type: ignore[arg-type]
