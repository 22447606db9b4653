"""``mtk verify layout`` and ``mtk verify resume``: proofs on the user's own machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from mtk.cli.options import CommonOptions, add_command

LAYOUT = "mtk.config.verify:VerifyLayoutConfig"
RESUME = "mtk.config.verify:VerifyResumeConfig"
# What --matrix takes besides its own options.
MATRIX_OPTIONS = ("matrix.", "runtime.seed")


def register(app: typer.Typer, parents: Mapping[str, typer.Typer]) -> None:
    """Add the commands to the group ``verify``."""
    del app
    group = parents["verify"]
    help = "A training step in this layout equals that of one process; or all layouts do."
    add_command(group, "layout", LAYOUT, _layout, help=help)
    help = "Training that stopped and continued equals training straight on, bit for bit."
    add_command(group, "resume", RESUME, _resume, help=help)


def _layout(given: dict[str, Any], common: CommonOptions) -> None:
    from mtk.cli.stage_commands import layers_from
    from mtk.log import Reporter

    reporter = Reporter(json_lines=common.json_lines)
    layers = layers_from(given, common)
    if any(_asks_for_matrix(layer.values) for layer in layers):
        _matrix(given, layers, common, reporter)
        return
    config = _resolved("layout", LAYOUT, layers)
    _alone(config.parallel.nproc)
    from mtk.errors import GateError
    from mtk.verification.layout import prove_layout
    from mtk.verification.prepare import comparable, small

    notes: list[str] = []
    if config.check.shrink:
        config, notes = small(config)
    config, more = comparable(config)
    for note in notes + more:
        reporter.info(note)
    proof = prove_layout(config, config.check.steps or 1, _device(config))
    reporter.result("\n".join(proof.lines()), **proof.fields(), notes=notes + more)
    if proof.failures:
        raise GateError(f"{proof.layout} does not equal one process: {_few(proof.failures)}.")


def _asks_for_matrix(values: Mapping[str, Any]) -> bool:
    nested = values.get("matrix")
    asked = nested.get("matrix") if isinstance(nested, Mapping) else nested
    return str(values.get("matrix.matrix", asked)).lower() in ("true", "1", "yes")


def _matrix(given: dict[str, Any], layers: Any, common: CommonOptions, reporter: Any) -> None:
    from mtk.config import resolve
    from mtk.config.verify import VerifyMatrixConfig
    from mtk.errors import ConfigError, Problem

    rule, fix = "is not read by --matrix, which has models of its own", "Leave it out."
    foreign = [key for key in given if not key.startswith(MATRIX_OPTIONS)]
    if foreign:
        raise ConfigError([Problem(key, given[key], rule, fix) for key in foreign])
    config = resolve(VerifyMatrixConfig, layers).config
    from mtk.errors import GateError
    from mtk.verification.matrix import run_matrix

    outcome = run_matrix(config, reporter, force=common.force)
    reporter.result("\n".join(outcome.lines()), **outcome.fields())
    if outcome.failed:
        raise GateError(
            f"{len(outcome.failed)} of {outcome.count} layouts do not equal one process."
        )


def _resume(given: dict[str, Any], common: CommonOptions) -> None:
    from mtk.cli.stage_commands import layers_from
    from mtk.log import Reporter

    reporter = Reporter(json_lines=common.json_lines)
    layers = layers_from(given, common)
    config = _resolved("resume", RESUME, layers)
    _alone(config.parallel.nproc)
    from mtk.errors import GateError
    from mtk.verification.resume import prove_resume
    from stages.pretrain import run

    proof = prove_resume(config, _device(config), run, reporter)
    reporter.result("\n".join(proof.lines()), **proof.fields())
    if proof.differing:
        raise GateError(f"continuing changes the result: {_few(proof.differing)} differ.")


def _resolved(name: str, config: str, layers: Any) -> Any:
    """As a stage resolves (recipe lowest) without being one."""
    from stages.registry import Stage

    return Stage(name, config, "", "", group="verify").resolve(layers).config


def _alone(ranks: int) -> None:
    """Raises LayoutError where somebody else has started ranks."""
    from mtk.config.world_rules import launched
    from mtk.errors import LayoutError

    found = launched()
    if found is not None:
        raise LayoutError(
            f"mtk verify starts its {ranks} ranks itself, and {found.variable} says that this "
            f"process is one of {found.world}. Run it once, outside torchrun and srun."
        )


def _device(config: Any) -> str:
    """``cuda`` where it is asked for, or "auto" finds a GPU for each rank."""
    import torch

    if config.runtime.device != "auto":
        return str(config.runtime.device)
    return "cuda" if torch.cuda.device_count() >= config.parallel.nproc else "cpu"


def _few(texts: Any) -> str:
    """The first of many."""
    more = f" and {len(texts) - 3} more" if len(texts) > 3 else ""
    return "; ".join(list(texts)[:3]) + more
