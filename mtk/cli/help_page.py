"""Help pages: all commands of the program, and a stage's options by panel.

Written here rather than left to Typer because its tables cut long option names off in
narrow terminals, and because loading its formatter takes longer than all else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from typer.core import TyperGroup

if TYPE_CHECKING:
    from typer.core import TyperOption


class ProgramGroup(TyperGroup):
    """The program itself: its help is the list of commands."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        commands = {name: command.help or "" for name, command in self.commands.items()}
        print_program_help(self.help or "", commands, self.epilog or "")


def print_program_help(summary: str, commands: Mapping[str, str], epilog: str) -> None:
    """Print usage, commands and exit codes to stdout."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"\nUsage: mtk [--version] COMMAND [OPTIONS]\n\n{summary}\n", markup=False)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column()
    for name, text in commands.items():
        table.add_row(name, text)
    console.print(Panel(table, title="Commands", title_align="left", border_style="dim"))
    console.print(f"mtk COMMAND --help shows a command's options.\n{epilog}\n", markup=False)


def print_help(path: str, summary: str, options: Sequence[TyperOption]) -> None:
    """Print usage, summary and all options by panel to stdout."""
    from rich.console import Console, Group
    from rich.padding import Padding
    from rich.panel import Panel
    from rich.text import Text

    console = Console(highlight=False)
    console.print(f"\nUsage: {path} [OPTIONS]\n\n{summary}\n", markup=False)
    panels: dict[str, list[Any]] = {}
    for option in options:
        name = getattr(option, "rich_help_panel", None) or "Options"
        heading = Text(", ".join(option.opts), style="bold cyan")
        if option.secondary_opts:
            heading.append(f" / {', '.join(option.secondary_opts)}", style="magenta")
        if option.metavar:
            heading.append(f" {option.metavar}", style="yellow")
        lines = panels.setdefault(name, [])
        lines.append(heading)
        lines.append(Padding(Text(option.help or ""), (0, 0, 0, 4)))
    for name, lines in panels.items():
        console.print(Panel(Group(*lines), title=name, title_align="left", border_style="dim"))
    console.print("mtk --help lists the commands; --help after a command shows this page.\n")
