"""The table of stage commands: configuration class, stage function, help.

Each entry becomes ``mtk NAME`` with options generated from the configuration class.
Both are named as ``module:attribute`` and the stage is imported only when it runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import typer

from mtk.cli.options import CommonOptions, add_command, cli_layer, command_line
from mtk.config import Layer, resolve
from mtk.config.files import read_layer, set_layer


@dataclass(frozen=True)
class StageCommand:
    """One command. config and run: ``module:attribute``."""

    name: str
    config: str
    run: str
    help: str
    parent: str | None = None


STAGES = (
    StageCommand(
        "pretrain",
        "mtk.config.pretrain:PretrainConfig",
        "stages.pretrain:run",
        "Train a model from scratch or from a checkpoint.",
    ),
    StageCommand(
        "preprocess",
        "mtk.config.preprocess:PreprocessConfig",
        "stages.preprocess:run",
        "Turn a corpus into token datasets (.bin/.idx).",
    ),
    StageCommand(
        "merge",
        "mtk.config.preprocess:MergeConfig",
        "stages.merge:run",
        "Concatenate the token datasets of a folder.",
    ),
    StageCommand(
        "train",
        "mtk.config.tokenizer:TrainTokenizerConfig",
        "stages.tokenizer:run",
        "Train a tokenizer from a corpus.",
        parent="tokenizer",
    ),
    StageCommand(
        "demo",
        "mtk.config.corpus:DemoCorpusConfig",
        "stages.corpus:run",
        "Write the demo corpus: documentation that comes with Python.",
        parent="corpus",
    ),
)


def register(app: typer.Typer, parents: Mapping[str, typer.Typer]) -> None:
    """Add every stage's command to ``app`` or to its parent group."""
    for stage in STAGES:
        target = parents[stage.parent] if stage.parent else app
        add_command(target, stage.name, load(stage.config), _body(stage), help=stage.help)


def load(name: str) -> Any:
    """The attribute behind ``module:attribute``."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def layers_from(given: Mapping[str, Any], common: CommonOptions) -> list[Layer]:
    """Recipe < YAML files < command line < ``--set``."""
    layers = [read_layer(path) for path in common.files]
    layers.append(cli_layer(given))
    if common.assignments:
        layers.append(set_layer(common.assignments))
    named = [layer.values["recipe"] for layer in layers if layer.values.get("recipe")]
    if named:
        from mtk.config.recipes import recipe_layer

        layers.insert(0, recipe_layer(named[-1]))
    return layers


def _body(stage: StageCommand) -> Any:
    def body(given: dict[str, Any], common: CommonOptions) -> None:
        from mtk.log import Reporter
        from mtk.session import Session

        resolved = resolve(load(stage.config), layers_from(given, common))
        reporter = Reporter(json_lines=common.json_lines)
        session = Session(reporter, command=command_line(), force=common.force)
        artifact = load(stage.run)(resolved.config, session)
        if artifact is not None:
            reporter.result(
                str(artifact.path),
                kind=artifact.kind,
                path=str(artifact.path),
                digest=artifact.digest,
                metrics=dict(artifact.metrics),
            )

    return body
