"""Lines that a person types: history, editing, prompts of several lines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

HISTORY, HISTORY_LINES = "~/.mtk_history", 1000
FENCE = '"""'


def entries(
    read: Callable[[str], str], terminal: bool, complain: Callable[[str], None]
) -> Iterator[str]:
    """What is entered until the end of the input.

    A line that ends in a backslash goes on in the next one; between lines with three double
    quotes everything is one entry as it stands. Ctrl-C drops what was begun.
    """
    while True:
        try:
            yield _entry(read, terminal)
        except EOFError:
            return
        except UnicodeDecodeError as error:
            complain(f"that line is not UTF-8 (byte {error.start})")
        except KeyboardInterrupt:
            complain("\n(nothing sent; /quit or Ctrl-D ends)")


def _entry(read: Callable[[str], str], terminal: bool) -> str:
    first, more = ("> ", ". ") if terminal else ("", "")
    line = read(first)
    if line.lstrip().startswith(FENCE):
        return _fenced(line.lstrip()[len(FENCE) :], read, more)
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(read(more))
    return "\n".join(lines)


def _fenced(line: str, read: Callable[[str], str], more: str) -> str:
    # The opening quotes may stand alone in their line.
    lines = [] if not line.strip() else [line]
    while not (lines and lines[-1].rstrip().endswith(FENCE)):
        try:
            lines.append(read(more))
        except EOFError:  # an input that ends inside counts as closed
            return "\n".join(lines)
    lines[-1] = lines[-1].rstrip()[: -len(FENCE)]
    return "\n".join(lines if lines[-1] else lines[:-1])


@contextmanager
def history(path: str | None) -> Iterator[None]:
    """Earlier entries by arrow keys, kept in a file that readline lets only its owner read; None
    is off.

    Raises nothing for a file that cannot be read or written: it is a convenience.
    """
    try:
        import readline
    except ImportError:  # not on every platform
        path = None
    if path is None or not sys.stdin.isatty():
        yield
        return
    file = Path(path).expanduser()
    with suppress(OSError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        readline.set_history_length(HISTORY_LINES)
        with suppress(OSError):
            readline.write_history_file(file)
