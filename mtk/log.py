"""One reporter for people (rich, on stderr) and machines (JSON lines, on stdout)."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console


class Progress(Protocol):
    """Handle of one progress bar."""

    def advance(self, amount: float = 1, **fields: object) -> None: ...
    def update(self, **fields: object) -> None: ...


class Reporter:
    """Tells people on stderr what happens and, with ``json_lines``, machines on stdout.

    quiet: no human output at all (for tests and for ranks other than 0).
    """

    def __init__(
        self,
        *,
        json_lines: bool = False,
        quiet: bool = False,
        stdout: IO[str] | None = None,
        stderr: IO[str] | None = None,
    ) -> None:
        self.json_lines = json_lines
        self.quiet = quiet
        self._stdout = stdout
        self._stderr = stderr
        self._console: Console | None = None

    @property
    def console(self) -> Console:
        """The rich console of the people's side, made on first use (rich costs 50 ms)."""
        if self._console is None:
            from rich.console import Console

            self._console = Console(
                file=self._stderr or sys.stderr, quiet=self.quiet, highlight=False, soft_wrap=True
            )
        return self._console

    def info(self, message: str) -> None:
        """A line for people."""
        if not self.quiet:
            self.console.print(message, markup=False)

    def warn(self, message: str) -> None:
        """A line for people that should not be overlooked; also an event for machines."""
        if not self.quiet:
            self.console.print(f"warning: {message}", style="yellow", markup=False)
        self.event("warning", message=message)

    def event(self, event: str, **fields: Any) -> None:
        """A line for machines: ``{"event": ..., ...}`` on stdout, only with --json."""
        if self.json_lines:
            line = json.dumps({"event": event, **fields}, ensure_ascii=False, default=str)
            print(line, file=self._stdout or sys.stdout, flush=True)

    def result(self, human: str, **fields: Any) -> None:
        """The outcome of a command: fields as one JSON line, or ``human`` on stdout."""
        if self.json_lines:
            self.event("result", **fields)
        elif not self.quiet:
            print(human, file=self._stdout or sys.stdout, flush=True)

    @contextmanager
    def progress(
        self, description: str, total: float | None, unit: str, done: float = 0.0
    ) -> Iterator[Progress]:
        """A bar with rate and ETA on a terminal; a line every ten seconds elsewhere.

        done: what an earlier run had finished; it does not count in the rate.
        """
        if self.quiet:
            yield _Silent()
        elif self.console.is_terminal:
            with _rich_progress(self.console, description, total, unit, done) as bar:
                yield bar
        else:
            lines = _Lines(self, description, total, unit, done)
            yield lines
            lines.close()


class _Silent:
    def advance(self, amount: float = 1, **fields: object) -> None:
        del amount, fields

    def update(self, **fields: object) -> None:
        del fields


class _Lines:
    """Progress for logs: a plain line at most every ``interval`` seconds."""

    interval = 10.0

    def __init__(
        self, reporter: Reporter, description: str, total: float | None, unit: str, done: float
    ) -> None:
        self._reporter, self._description = reporter, description
        self._total, self._unit = total, unit
        self._done = self._before = done
        self._fields: dict[str, object] = {}
        self._start = self._last = time.monotonic()
        self._printed = -1.0

    def advance(self, amount: float = 1, **fields: object) -> None:
        self._done += amount
        self.update(**fields)

    def update(self, **fields: object) -> None:
        self._fields.update(fields)
        if time.monotonic() - self._last >= self.interval:
            self._print()

    def _print(self) -> None:
        now = time.monotonic()
        self._last, self._printed = now, self._done
        rate = (self._done - self._before) / max(now - self._start, 1e-9)
        text = f"{self._description}: {self._done:,.0f}"
        if self._total:
            left = (self._total - self._done) / rate if rate else float("inf")
            text += f" of {self._total:,.0f} {self._unit}, {rate:,.1f}/s, {_clock(left)} left"
        else:
            text += f" {self._unit}, {rate:,.1f}/s"
        extra = " ".join(f"{key} {value}" for key, value in self._fields.items())
        self._reporter.info(f"{text} {extra}".rstrip())

    def close(self) -> None:
        if self._done != self._printed:
            self._print()


@contextmanager
def _rich_progress(
    console: Console, description: str, total: float | None, unit: str, done: float
) -> Iterator[Progress]:
    from rich import progress as rp

    class Rate(rp.ProgressColumn):
        def render(self, task: rp.Task) -> str:
            speed = task.finished_speed or task.speed
            return f"{speed:,.1f} {unit}/s" if speed else f"- {unit}/s"

    columns = (
        rp.TextColumn("{task.description}"),
        rp.BarColumn(),
        rp.MofNCompleteColumn(),
        Rate(),
        rp.TimeRemainingColumn(),
        rp.TextColumn("{task.fields[extra]}"),
    )
    with rp.Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total, completed=int(done), extra="")

        class Bar:
            def advance(self, amount: float = 1, **fields: object) -> None:
                progress.advance(task, amount)
                if fields:
                    self.update(**fields)

            def update(self, **fields: object) -> None:
                extra = " ".join(f"{key} {value}" for key, value in fields.items())
                progress.update(task, extra=extra)

        yield Bar()


def _clock(seconds: float) -> str:
    if seconds == float("inf"):
        return "?"
    minutes, secs = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"
