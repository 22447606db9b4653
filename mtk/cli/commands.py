"""All commands of the program, registered on one app."""

from __future__ import annotations

import typer

from mtk.cli import serving_commands, stage_commands, tokenizer_commands

GROUPS = {
    "tokenizer": "Train and inspect tokenizers.",
    "corpus": "Corpora that every machine can make.",
    "flow": "Prefect flows: chains of stages.",
    "checkpoint": "Look into checkpoints and check them.",
}


def register(app: typer.Typer) -> None:
    """Add every command once; later calls change nothing."""
    if app.registered_commands:
        return
    groups = {name: typer.Typer(help=text, no_args_is_help=True) for name, text in GROUPS.items()}
    stage_commands.register(app, groups)
    tokenizer_commands.register(app, groups)
    serving_commands.register(app, groups)
    for name, group in groups.items():
        if group.registered_commands:
            app.add_typer(group, name=name)
