"""``mtk STAGE`` for every entry of the table of stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from mtk.cli.options import CommandBody, CommonOptions, add_command, cli_layer, command_line
from mtk.config import Layer
from mtk.config.files import read_layer, set_layer
from stages.registry import STAGES, Stage


def register(app: typer.Typer, groups: Mapping[str, typer.Typer]) -> None:
    """Add every stage's command to ``app`` or to its group."""
    for stage in STAGES:
        target = groups[stage.group] if stage.group else app
        add_command(target, stage.name, stage.config, _body(stage), help=stage.help)


def layers_from(given: Mapping[str, Any], common: CommonOptions) -> list[Layer]:
    """YAML files < command line < ``--set``."""
    layers = [read_layer(path) for path in common.files]
    layers.append(cli_layer(given))
    if common.assignments:
        layers.append(set_layer(common.assignments))
    return layers


def _body(stage: Stage) -> CommandBody:
    def body(given: dict[str, Any], common: CommonOptions) -> None:
        from mtk.config.world_rules import speaks
        from mtk.log import Reporter
        from mtk.session import Session

        resolved = stage.resolve(layers_from(given, common))
        reporter = Reporter(json_lines=common.json_lines)
        session = Session(reporter, command=command_line(), force=common.force)
        artifact = stage.run(resolved.config, session)
        if artifact is not None and speaks():
            reporter.result(
                str(artifact.path),
                kind=artifact.kind,
                path=str(artifact.path),
                digest=artifact.digest,
                metrics=dict(artifact.metrics),
            )

    return body
