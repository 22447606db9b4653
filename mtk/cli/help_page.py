"""The help page of a stage command: one panel a group, names never cut off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typer.core import TyperOption


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
