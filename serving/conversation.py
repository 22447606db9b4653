"""The interactive side of ``mtk client``: prompt, streamed continuation, again."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mtk.config.coerce import CoercionError, coerce
from mtk.errors import ServingError
from serving.client import Answer, Client

HISTORY, HISTORY_LINES = "~/.mtk_history", 1000
SETTINGS: dict[str, tuple[str, Any]] = {
    "/tokens": ("max_tokens", int),
    "/temperature": ("temperature", float),
    "/top_k": ("top_k", int),
    "/top_p": ("top_p", float),
    "/seed": ("seed", int | None),
}
HELP = (
    "A line is continued by the model. /tokens N, /temperature T, /top_k K, /top_p P and "
    "/seed S change how; /settings shows them; /quit ends. Ctrl-C stops an answer."
)


class Conversation:
    """Reads prompts from standard input until its end or ``/quit``."""

    def __init__(self, client: Client, options: dict[str, Any]) -> None:
        self._client = client
        self._options = dict(options)
        self._terminal = sys.stdin.isatty()

    def run(self) -> None:
        """Raises WorkerError when the server cannot be reached; a refused prompt only
        prints why."""
        model = self._client.model()
        if self._terminal:
            self._say(f"{model} at {self._client.url}. {HELP}")
        with _history(self._terminal):
            for line in self._lines():
                if not line.strip():
                    continue
                if line.strip() in ("/quit", "/exit"):
                    return
                if line.startswith("/"):
                    self._command(line)
                else:
                    self._answer(line)

    def _lines(self) -> Iterator[str]:
        while True:
            try:
                yield input("> " if self._terminal else "")
            except EOFError:
                return
            except UnicodeDecodeError as error:
                self._say(f"that line is not UTF-8 (byte {error.start})")

    def _answer(self, prompt: str) -> None:
        answer = Answer()
        stream = self._client.stream(prompt, answer, **self._options)
        try:
            for piece in stream:
                print(printable(piece) if sys.stdout.isatty() else piece, end="", flush=True)
        except KeyboardInterrupt:
            stream.close()
            self._say("\n(stopped)")
            return
        except ServingError as error:
            self._say(str(error))
            return
        print(flush=True)

    def _command(self, line: str) -> None:
        name, _, text = line.strip().partition(" ")
        if name in SETTINGS:
            key, kind = SETTINGS[name]
            try:
                self._options[key] = coerce(text.strip(), kind)
            except CoercionError as error:
                self._say(f"{name} {error}")
        elif name == "/settings":
            self._say(", ".join(f"{key} {value}" for key, value in self._options.items()))
        else:
            self._say(HELP)

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """``text`` without control characters, which could command the terminal."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\N{REPLACEMENT CHARACTER}"
        for c in text
    )


@contextmanager
def _history(wanted: bool) -> Iterator[None]:
    """Earlier prompts by arrow keys, also those of earlier sessions."""
    try:
        import readline
    except ImportError:  # not on every platform
        wanted = False
    if not wanted:
        yield
        return
    path = Path(HISTORY).expanduser()
    with suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        readline.set_history_length(HISTORY_LINES)
        with suppress(OSError):
            readline.write_history_file(path)
