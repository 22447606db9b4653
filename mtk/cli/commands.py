"""All commands of the program, registered on one app."""

from __future__ import annotations

import typer

from mtk.cli import (
    artifact_commands,
    bench_commands,
    config_commands,
    curate_commands,
    data_commands,
    data_trace,
    doctor_commands,
    evaluation_commands,
    flow_commands,
    plan_commands,
    serving_commands,
    stage_commands,
    tokenizer_commands,
    verify_commands,
)

GROUPS = {
    "tokenizer": "Train and inspect tokenizers.",
    "corpus": "Corpora that every machine can make.",
    "curate": "Raw dumps and crawls to clean corpora.",
    "data": "What is in datasets, and what a training step saw of them.",
    "flow": "Prefect flows: chains of stages.",
    "verify": "Proofs on your machine: layouts, resuming.",
    "config": "See what a command would run with.",
    "evaluation": "Compare evaluations.",
    "bench": "How fast, and how much memory, on the machine at hand.",
    "checkpoint": "Look into checkpoints and check them.",
}

# Modules of commands with shapes of their own, each with a function register(app, groups).
TOPICS = (
    tokenizer_commands,
    plan_commands,
    flow_commands,
    artifact_commands,
    config_commands,
    doctor_commands,
    serving_commands,
    bench_commands,
    verify_commands,
    evaluation_commands,
    curate_commands,
    data_commands,
    data_trace,
)


def register(app: typer.Typer) -> None:
    """Add every command once; later calls change nothing."""
    if app.registered_commands:
        return
    groups = {name: typer.Typer(help=text, no_args_is_help=True) for name, text in GROUPS.items()}
    stage_commands.register(app, groups)
    for topic in TOPICS:
        topic.register(app, groups)
    for name, group in groups.items():
        if group.registered_commands:
            app.add_typer(group, name=name)
