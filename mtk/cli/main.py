"""Composition root: the ``mtk`` program.

Commands import their stage inside the function, so that ``mtk --help`` imports
neither torch nor prefect nor flask.
"""

from __future__ import annotations

import os
import sys

import typer

from mtk import __version__
from mtk.cli.help_page import ProgramGroup
from mtk.errors import EXIT_CODES, ArtifactError, ConfigError, MtkError

OUT_OF_MEMORY = (
    "there is not enough memory for these sizes. Lower --micro-batch-size, --seq-length, the "
    "model or the training length; mtk plan tells beforehand what a run needs."
)

# Typer's usage errors, whether it brings its own copy of click (>= 0.26) or not.
_UsageProblem: type[Exception] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)

app = typer.Typer(
    name="mtk",
    cls=ProgramGroup,
    help="From raw text to a served language model, with proof at every step.",
    epilog="Exit codes: " + " · ".join(f"{code} {text}" for code, text in EXIT_CODES.items()),
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(
    version: bool = typer.Option(False, "--version", help="Print the version and leave."),
) -> None:
    if version:
        print(f"mtk {__version__}")
        raise typer.Exit


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; returns the documented exit code (never a traceback for users)."""
    from mtk.cli import commands

    commands.register(app)
    arguments = sys.argv[1:] if arguments is None else arguments
    json_lines = "--json" in arguments
    try:
        outcome = app(args=arguments, standalone_mode=False)
        return int(outcome) if isinstance(outcome, int) else 0
    except _UsageProblem as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            return 2  # the help was printed instead
        message = error.format_message()  # type: ignore[attr-defined]
        _report(ConfigError(message), json_lines, hint=_usage_hint(error))
        return 2
    except MtkError as error:
        _report(error, json_lines)
        return error.exit_code
    except BrokenPipeError:
        # Whoever read our output has enough; nothing more may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _report(ArtifactError(f"{where}{error.strerror or error}."), json_lines)
        return ArtifactError.exit_code
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        _report(ConfigError(OUT_OF_MEMORY), json_lines)
        return ConfigError.exit_code
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return 130


def _out_of_memory(error: Exception) -> bool:
    """Also torch's, which has a class of its own for the GPU and only a text for the CPU."""
    named = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or named or "can't allocate memory" in str(error)


def _usage_hint(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return f" Try {context.command_path} --help." if context else ""


def _report(error: MtkError, json_lines: bool, hint: str = "") -> None:
    print(f"mtk: {error.kind} error: {error}{hint}", file=sys.stderr)
    if json_lines:
        import json

        fields = {"kind": error.kind, "message": str(error), "exit_code": error.exit_code}
        print(json.dumps({"event": "error", **fields}, ensure_ascii=False), flush=True)


def run() -> None:
    """Entry point of the ``mtk`` script."""
    # torch's threads spin for long while they wait, which starves every process where cores
    # are shared: two trainings on two cores ran at 6 % of their speed. A short spin costs
    # nothing measurable alone (docs/benchmarks/threads.md). libgomp reads it at its import.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    sys.exit(main())


if __name__ == "__main__":
    run()
