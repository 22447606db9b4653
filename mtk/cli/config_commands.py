"""``mtk config show STAGE [options of that stage]``: every resolved value and its origin."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from mtk.cli.options import CommandBody, CommonOptions, add_command

if TYPE_CHECKING:
    from mtk.config import Resolved
    from stages.registry import Stage


_HELP = (
    "Resolve the options of a stage as its command would, and print them as YAML; --origin "
    "says where each comes from."
)


def register(app: typer.Typer, parents: Mapping[str, typer.Typer]) -> None:
    """Add ``show`` to the group ``config``."""
    del app
    # The options are those of the stage that is named, so they are read in a second step.
    parents["config"].command(
        "show",
        help=f"{_HELP} Usage: mtk config show STAGE [OPTIONS].",
        context_settings={
            "allow_extra_args": True,
            "ignore_unknown_options": True,
            "help_option_names": [],
        },
    )(_show)


def _show(context: typer.Context) -> None:
    arguments = [word for word in context.args if word != "--origin"]
    if arguments == ["--help"]:
        _print_help()
        return
    stage, arguments = _split(arguments)
    inner = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    body = _body(stage, with_origin="--origin" in context.args)
    add_command(inner, stage.name, stage.config, body, help=stage.help)
    name = f"{stage.group or ''} {stage.name}".strip()
    inner(args=arguments, prog_name=f"mtk config show {name}", standalone_mode=False)


def _print_help() -> None:
    from stages.registry import STAGES

    names = ", ".join(f"{stage.group or ''} {stage.name}".strip() for stage in STAGES)
    print(
        f"Usage: mtk config show STAGE [OPTIONS] [--origin]\n\n{_HELP}\n\nSTAGE is one of "
        f"{names}.\nmtk config show STAGE --help lists the options of that stage."
    )


def _split(arguments: list[str]) -> tuple[Stage, list[str]]:
    """The stage named by the first word, or by the first two ("tokenizer train")."""
    from mtk.errors import ConfigError, Problem
    from stages.registry import STAGES

    table = {f"{stage.group or ''} {stage.name}".strip(): stage for stage in STAGES}
    for length in (2, 1):
        name = " ".join(arguments[:length])
        if name in table:
            return table[name], arguments[length:]
    found = arguments[0] if arguments else None
    near = difflib.get_close_matches(str(found), table, n=1)
    fix = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(table)}."
    raise ConfigError([Problem("stage", found, "no such stage", fix)])


def _body(stage: Stage, *, with_origin: bool) -> CommandBody:
    def body(given: dict[str, Any], common: CommonOptions) -> None:
        from mtk.cli.stage_commands import layers_from
        from mtk.config import to_dict
        from mtk.log import Reporter

        resolved = stage.resolve(layers_from(given, common))
        origins = origins_of(resolved)
        Reporter(json_lines=common.json_lines).result(
            "\n".join(yaml_lines(resolved.config, origins if with_origin else {})),
            config=to_dict(resolved.config),
            origins=origins,
        )

    return body


def origins_of(resolved: Resolved[Any]) -> dict[str, str]:
    """Layer by dotted key; "derived" where a rule filled in what no layer gave."""
    from mtk.config import leaves

    origins = dict(resolved.origins)
    for leaf in leaves(type(resolved.config)):
        value = resolved.config
        for name in leaf.path:
            value = getattr(value, name)
        if origins[leaf.key] == "default" and value != leaf.default:
            origins[leaf.key] = "derived"
    return origins


def yaml_lines(config: Any, origins: Mapping[str, str]) -> list[str]:
    """The configuration as YAML that ``--config`` reads back; origins as comments."""
    import json

    from mtk.config import leaves

    lines: list[str] = []
    opened: tuple[str, ...] = ()
    for leaf in leaves(type(config)):
        for depth, name in enumerate(leaf.path[:-1]):
            if leaf.path[: depth + 1] != opened[: depth + 1]:
                lines.append(f"{'  ' * depth}{name}:")
        opened = leaf.path[:-1]
        value = config
        for name in leaf.path:
            value = getattr(value, name)
        # JSON scalars and lists are YAML too, and keep text apart from numbers.
        text = json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
        comment = f"  # {origins[leaf.key]}" if leaf.key in origins else ""
        lines.append(f"{'  ' * len(opened)}{leaf.name}: {text}{comment}")
    return lines
