"""``mtk plan`` and ``mtk recipes``: what a run would need, before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtk.cli.options import CommonOptions, add_command

if TYPE_CHECKING:
    from mtk.config.plan import PlanConfig

PLAN = "mtk.config.plan:PlanConfig"
_JSON = typer.Option("--json", help="Machine-readable JSON lines on stdout, people on stderr.")


def register(app: typer.Typer, parents: Mapping[str, typer.Typer]) -> None:
    """Add the commands to ``app``."""
    del parents
    help = "Layout, memory, time and cost of a pretraining, before anything starts."
    add_command(app, "plan", PLAN, _plan, help=help)
    app.command("recipes", help="List the named starting points of mtk pretrain.")(_recipes)


def _plan(given: dict[str, Any], common: CommonOptions) -> None:
    from dataclasses import replace

    from mtk.cli.stage_commands import layers_from
    from mtk.log import Reporter
    from mtk.models.count_families import assumed_vocab_size
    from mtk.parallel.planning import with_vocabulary
    from stages.registry import Stage

    # The planner resolves as a stage does (recipe lowest) without being one.
    stage = Stage("plan", PLAN, "", "")
    config: PlanConfig = stage.resolve(layers_from(given, common)).config
    assumed = assumed_vocab_size(config.recipe, config.model.family)
    model = with_vocabulary(config.model, assumed)
    guessed = model is not config.model
    config = replace(config, model=model)
    Reporter(json_lines=common.json_lines).result(
        "\n".join(plan_lines(config, guessed)), **plan_fields(config)
    )


def plan_fields(config: PlanConfig) -> dict[str, Any]:
    """The plan for machines; bytes, seconds, plain numbers."""
    from mtk.config.plan import GPUS
    from mtk.models.count_families import active_parameters, parameters
    from mtk.parallel.estimate import estimate
    from mtk.parallel.planning import fullest_rank

    memory, cost = fullest_rank(config), estimate(config)
    return {
        "measured": False,
        "parameters": parameters(config.model),
        "active_parameters": active_parameters(config.model),
        "gpus": config.gpus,
        "data_parallel_size": config.data_parallel_size,
        "global_batch_size": config.global_batch_size,
        "memory_bytes": {**vars(memory), "total": memory.total},
        "gpu_memory_bytes": GPUS[config.hardware.gpu].memory,
        "flops_per_token_full": cost.flops_per_token.full,
        "flops_per_token_causal": cost.flops_per_token.causal,
        "steps": cost.steps,
        "tokens": cost.tokens,
        "step_seconds": cost.step_seconds,
        "days": cost.days,
        "cost": cost.cost,
    }


def plan_lines(config: PlanConfig, guessed_vocabulary: bool) -> list[str]:
    """The plan for people."""
    fields = plan_fields(config)
    model, parallel, hardware = config.model, config.parallel, config.hardware
    vocabulary = f"vocabulary {model.vocab_size}{' (assumed)' if guessed_vocabulary else ''}"
    active = f" ({fields['active_parameters']:,} a token)" if model.num_experts else ""
    experts = f" x EP {parallel.expert_model_parallel_size}" if model.num_experts else ""
    lines = [
        "Estimates by formula; nothing below was measured.",
        "",
        f"model        {model.family}, {fields['parameters']:,} parameters{active}, {vocabulary}, "
        f"padded to {model.padded_vocab_size}",
        f"layout       {fields['gpus']} x {hardware.gpu}: TP {parallel.tensor_model_parallel_size} "
        f"x PP {parallel.pipeline_model_parallel_size} x CP {parallel.context_parallel_size} "
        f"x DP {fields['data_parallel_size']}{experts} (data parallel: "
        f"{parallel.data_parallel_sharding})",
        f"batch        {fields['global_batch_size']} samples = "
        f"{fields['global_batch_size'] * model.seq_length:,} tokens a step",
    ]
    lines += _memory_lines(config, fields)
    full, causal = fields["flops_per_token_full"], fields["flops_per_token_causal"]
    lines += [
        f"FLOPs/token  {full / 1e9:.4g} G with attention in full, {causal / 1e9:.4g} G causal",
        f"length       {fields['steps']:,} steps, {fields['tokens']:,} tokens"
        + ("" if _has_length(config) else " (one step; no length given)"),
        f"time         {_duration(fields['step_seconds'])} a step, "
        f"{fields['days']:.3g} days in all at an assumed MFU of {hardware.mfu:.0%}",
    ]
    if fields["cost"] is not None:
        lines.append(
            f"cost         {fields['cost']:,.2f} at {hardware.price_per_gpu_hour:g} a GPU hour"
        )
    return lines + _notes(config)


def _memory_lines(config: PlanConfig, fields: Mapping[str, Any]) -> list[str]:
    memory, limit = fields["memory_bytes"], fields["gpu_memory_bytes"]
    verdict = "fits" if memory["total"] <= 0.9 * limit else "is tight"
    if memory["total"] > limit:
        verdict = "DOES NOT FIT"
    parts = ("weights", "gradients", "optimizer", "activations", "logits")
    listed = ", ".join(f"{part} {memory[part] / 1e9:.2f}" for part in parts)
    return [
        f"memory       {memory['total'] / 1e9:.2f} GB on the fullest rank (stage "
        f"{memory['stage']}): {verdict} in {limit / 1e9:.0f} GB",
        f"             {listed} (GB)",
    ]


def _notes(config: PlanConfig) -> list[str]:
    from mtk.config.attention_rules import surely_fused
    from mtk.parallel.planning import attention_matrix

    notes = ["", "Not counted: fragmentation, workspaces, communication buffers, CUDA context."]
    if kept := attention_matrix(config):
        model = config.model
        masked = model.window_size is not None or model.biases_scores or model.family != "gpt"
        fused = "as PyTorch's own for masks" if masked else "--use-flash-attn"
        notes.append(
            f"Attention matrices are counted as kept ({kept / 1e9:.2f} GB a layer before TP); a "
            f"fused kernel ({fused}) does not keep them."
        )
    never_kept = surely_fused(config.runtime.attention_backend)
    if never_kept and config.parallel.recompute_granularity == "selective":
        notes.append(
            "Selective recomputation saves nothing beside a fused attention kernel, which never "
            "keeps its matrices; full recomputation saves more."
        )
    return notes


def _has_length(config: PlanConfig) -> bool:
    return any(vars(config.length).values())


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _recipes(json_: Annotated[bool, _JSON] = False) -> None:
    from mtk.config.model import ModelConfig
    from mtk.config.recipes import RECIPES
    from mtk.config.resolve import Layer, resolve
    from mtk.config.schema import leaves
    from mtk.log import Reporter
    from mtk.models.count_families import assumed_vocab_size, parameters
    from mtk.parallel.planning import with_vocabulary

    names = {leaf.name for leaf in leaves(ModelConfig)}
    counts: dict[str, int] = {}
    for name, values in RECIPES.items():
        own = {key: value for key, value in values.items() if key in names}
        model = resolve(ModelConfig, [Layer(name, own)]).config
        model = with_vocabulary(model, assumed_vocab_size(name, model.family))
        counts[name] = parameters(model)
    lines = [f"{name:<14} {count / 1e6:>12,.1f} M parameters" for name, count in counts.items()]
    lines += ["", "Counted with the published vocabulary, as mtk plan does without --vocab-size."]
    fields = {n: {"parameters": counts[n], "options": dict(RECIPES[n])} for n in counts}
    Reporter(json_lines=json_).result("\n".join(lines), recipes=fields)
