"""Typer commands whose options are generated from configuration dataclasses.

Every value arrives as text and is typed by :mod:`mtk.config`, so that all mistakes of
a command line are reported together and in one style.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperCommand, TyperOption

from mtk.config import Layer, Leaf, leaves
from mtk.config.coerce import is_bool, is_tuple, type_name
from mtk.errors import ConfigError, Problem
from stages.registry import load

CommandBody = Callable[[dict[str, Any], "CommonOptions"], None]


class GreedyCommand(TyperCommand):
    """Lets one flag take several values: ``--data-path 0.3 A 0.7 B``.

    Typer repeats a flag for that; this rewrites the arguments into the repeated form.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        repeatable = {
            name
            for parameter in self.params
            if isinstance(parameter, TyperOption) and parameter.multiple
            for name in parameter.opts
        }
        return super().parse_args(ctx, _repeat_flags(args, repeatable))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Panels in which no option name is cut off, however narrow the terminal."""
        from mtk.cli.help_page import print_help

        options = [p for p in self.params if isinstance(p, TyperOption) and not p.hidden]
        print_help(ctx.command_path, self.help or "", options)


class LateCommand(GreedyCommand):
    """A command that learns its options when it is called: those of all commands together take
    longer to make than all else that ``mtk --help`` does.

    made: the command with its options.
    """

    made: ClassVar[Callable[[], TyperCommand]]

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        whole = type(self).made()
        self.params, self.callback = whole.params, whole.callback
        return super().make_context(info_name, args, parent, **extra)


def _repeat_flags(args: list[str], repeatable: set[str]) -> list[str]:
    out: list[str] = []
    current: str | None = None
    fresh = False
    for arg in args:
        name, equals, _ = arg.partition("=")
        if arg.startswith("--"):
            current = name if name in repeatable and not equals else None
            fresh = True
            out.append(arg)
        elif current is not None and not fresh:
            out += [current, arg]
        else:
            out.append(arg)
            fresh = False
    return out


class CommonOptions:
    """The options that every stage command has besides its own configuration."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.files: list[str] = list(given["config"] or [])
        self.assignments: list[str] = list(given["set_"] or [])
        self.json_lines = bool(given["json_"])
        self.force = bool(given["force"])


_COMMON = [
    ("config", list[str] | None, ("--config",), "YAML file (or artifact.json) with options."),
    ("set_", list[str] | None, ("--set",), "One option as group.name=value; wins over all."),
    ("json_", bool, ("--json",), "Machine-readable JSON lines on stdout, people on stderr."),
    ("force", bool, ("--force",), "Replace an existing output."),
]


def add_command(app: typer.Typer, name: str, config: str, body: CommandBody, *, help: str) -> None:
    """Register ``name`` on ``app`` with one option per leaf of a configuration class.

    config: the class as ``module:attribute``, imported when the command is called.
    body(given, common) is called with the options that were given, by dotted key.
    """

    class Command(LateCommand):
        @staticmethod
        def made() -> TyperCommand:
            return _with_options(name, load(config), body)

    app.command(name, cls=Command, help=help, no_args_is_help=False)(_nothing)


def _nothing() -> None:
    """The body of a command that has no options yet."""


def _with_options(name: str, config_class: type, body: CommandBody) -> TyperCommand:
    found = [leaf for leaf in leaves(config_class) if not leaf.hidden]

    def command(**values: Any) -> None:
        body(_given(found, values), CommonOptions(values))

    parameters = [parameter for leaf in found for parameter in _leaf_parameters(leaf)]
    parameters += [_common_parameter(*common) for common in _COMMON]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    alone = typer.Typer(add_completion=False)
    alone.command(name, cls=GreedyCommand, no_args_is_help=False)(command)
    made = typer.main.get_command(alone)
    assert isinstance(made, TyperCommand)
    return made


def _given(found: list[Leaf], values: Mapping[str, Any]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    problems: list[Problem] = []
    for leaf in found:
        said = {f: v for f, v in leaf.spec.shortcuts if values[_shortcut_name(f)]}
        if values[_parameter_name(leaf)] not in (None, [], ()):
            said[flag_names(leaf)[0]] = values[_parameter_name(leaf)]
        if len({str(value) for value in said.values()}) > 1:
            rule = f"{' and '.join(said)} contradict each other"
            problems.append(Problem(leaf.key, tuple(said.values()), rule, "Give one of them."))
        if said:
            given[leaf.key] = list(said.values())[-1]
    if problems:
        raise ConfigError(problems)
    return given


def cli_layer(given: Mapping[str, Any]) -> Layer:
    return Layer("command line", given)


def _parameter_name(leaf: Leaf) -> str:
    return leaf.key.replace(".", "__")


def _shortcut_name(flag: str) -> str:
    return "shortcut_" + flag[2:].replace("-", "_")


def flag_names(leaf: Leaf) -> tuple[str, ...]:
    """The command-line spellings of an option: its long name and its aliases."""
    return (f"--{leaf.name.replace('_', '-')}", *leaf.spec.aliases)


def _leaf_parameters(leaf: Leaf) -> Iterator[inspect.Parameter]:
    yield _leaf_parameter(leaf)
    for flag, value in leaf.spec.shortcuts:
        text = f"Same as {flag_names(leaf)[0]} {value}."
        info = typer.Option(flag, help=text, rich_help_panel=leaf.panel, show_default=False)
        yield _keyword(_shortcut_name(flag), Annotated[bool, info], False)


def _leaf_parameter(leaf: Leaf) -> inspect.Parameter:
    flags = flag_names(leaf)
    default = _shown_default(leaf)
    text = leaf.spec.help + (f" [default: {default}]" if default else "")
    text += " [required]" if leaf.spec.required else ""
    if is_bool(leaf.annotation):
        annotation: Any = bool | None
        flags = (f"{flags[0]}/--no-{flags[0][2:]}", *flags[1:])
        metavar = None
    elif is_tuple(leaf.annotation):
        annotation, metavar = list[str] | None, type_name(leaf.annotation)
    else:
        annotation, metavar = str | None, type_name(leaf.annotation)
    info = typer.Option(
        *flags, help=text, rich_help_panel=leaf.panel, metavar=metavar, show_default=False
    )
    return _keyword(_parameter_name(leaf), Annotated[annotation, info], None)


def _common_parameter(
    name: str, annotation: Any, flags: tuple[str, ...], help: str
) -> inspect.Parameter:
    info = typer.Option(*flags, help=help, rich_help_panel="Every command", show_default=False)
    return _keyword(name, Annotated[annotation, info], False if annotation is bool else None)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default
    )


def _shown_default(leaf: Leaf) -> str:
    default = leaf.default
    if default is None or default == ():
        return ""
    if isinstance(default, tuple):
        return " ".join(str(item) for item in default)
    return str(default)


def command_line() -> str:
    """The command as typed, for the manifest."""
    import shlex

    return shlex.join(["mtk", *sys.argv[1:]])
