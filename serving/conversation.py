"""The interactive side of ``mtk client``: prompt, streamed answer, again."""

from __future__ import annotations

import difflib
import sys
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtk.config.coerce import CoercionError, coerce
from mtk.errors import ServingError
from serving.client import Client, Message
from serving.client_stream import Stream
from serving.line_input import HISTORY, entries, history

# Names of settings, what the request calls them, and their types.
SETTINGS: dict[str, tuple[str, Any]] = {
    "tokens": ("max_tokens", int),
    "temperature": ("temperature", float),
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "seed": ("seed", int | None),
}
HELP = """\
A line is {what} by the model. A backslash at its end goes on in the next line; lines between
\"\"\" and \"\"\" are one prompt. Ctrl-C stops an answer.
  /set NAME VALUE   tokens, temperature, top_k, top_p, seed, stop (/temperature 0.7 for short)
  /settings         shows them
  /chat on|off      conversation with a memory, or plain continuation
  /system TEXT      what a conversation begins with; without TEXT nothing
  /reset            forgets the conversation
  /retry            asks the last prompt again
  /count TEXT       tells how many tokens a text has
  /save FILE        writes prompts and answers into a new file
  /quit             ends; // at the beginning of a prompt is one slash"""


@dataclass
class Talk:
    """What has been said. system: in front of a conversation, "" for nothing."""

    chat: bool = False
    system: str = ""
    messages: list[Message] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    last: str | None = None

    def with_system(self, prompt: str) -> list[Message]:
        """The messages that are sent for the next prompt."""
        first = [Message(role="system", content=self.system)] if self.system else []
        return [*first, *self.messages, Message(role="user", content=prompt)]


class Conversation:
    """Reads prompts from standard input until its end or ``/quit``.

    options: fields of the request by their names there. history_file: None keeps none.
    """

    def __init__(
        self,
        client: Client,
        options: dict[str, Any],
        *,
        chat: bool = False,
        system: str = "",
        history_file: str | None = HISTORY,
    ) -> None:
        self._client = client
        self._options = dict(options)
        self._talk = Talk(chat, system)
        self._history_file = history_file
        self._terminal = sys.stdin.isatty()
        self._commands: dict[str, Callable[[str], None]] = {
            "set": self._set,
            "settings": self._show,
            "chat": self._choose_chat,
            "system": self._set_system,
            "reset": self._reset,
            "retry": self._retry,
            "count": self._count,
            "save": self._save,
            "help": lambda _: self._help(),
        }

    def run(self) -> None:
        """Raises NoAnswerError when the server cannot be reached; a refused prompt only
        prints why."""
        model = self._client.model()
        if self._terminal:
            self._say(f"{model} at {self._client.url}. /help tells more, /quit ends.")
        with history(self._history_file):
            for entry in entries(input, self._terminal, self._say):
                word = entry.strip()
                if word in ("/quit", "/exit"):
                    return
                if entry.startswith("/") and not entry.startswith("//"):
                    self._command(word)
                elif word:
                    self._ask(entry[1:] if entry.startswith("//") else entry)

    def _ask(self, prompt: str) -> None:
        talk = self._talk
        talk.last = prompt
        try:
            if talk.chat:
                stream = self._client.stream_chat(talk.with_system(prompt), **self._options)
            else:
                stream = self._client.stream(prompt, **self._options)
            with stream:
                self._show_answer(stream)
        except ServingError as error:
            self._say(str(error))
            return
        text = stream.answer.text
        talk.said += [f"> {prompt}", text, ""]
        if talk.chat:
            # What was stopped half-way was said all the same.
            talk.messages.append(Message(role="user", content=prompt))
            talk.messages.append(Message(role="assistant", content=text))

    def _show_answer(self, stream: Stream) -> None:
        try:
            for piece in stream:
                print(printable(piece) if sys.stdout.isatty() else piece, end="", flush=True)
            print(flush=True)
        except KeyboardInterrupt:
            self._say("\n(stopped)")

    # -- Commands -------------------------------------------------------------------------

    def _command(self, line: str) -> None:
        name, _, text = line[1:].partition(" ")
        if name in (*SETTINGS, "stop"):
            self._set(f"{name} {text}")
        elif name in self._commands:
            self._commands[name](text.strip())
        else:
            self._say(_unknown(name, [*self._commands, *SETTINGS, "stop", "quit"]))

    def _help(self) -> None:
        self._say(HELP.format(what="answered" if self._talk.chat else "continued"))

    def _set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        if name == "stop":
            # Written with \n where a newline is meant, several separated by |.
            texts = [part.replace("\\n", "\n") for part in value.split("|") if part]
            self._options["stop"] = texts or None
        elif name in SETTINGS:
            key, kind = SETTINGS[name]
            try:
                self._options[key] = coerce(value.strip(), kind)
            except CoercionError as error:
                self._say(f"/{name} {error}")
        else:
            self._say(_unknown(name, [*SETTINGS, "stop"]))

    def _show(self, text: str) -> None:
        del text
        shown = {**self._options, "chat": self._talk.chat, "system": self._talk.system or None}
        self._say(", ".join(f"{key} {value}" for key, value in shown.items()))

    def _choose_chat(self, text: str) -> None:
        if text not in ("", "on", "off"):
            self._say("/chat takes on or off")
            return
        self._talk.chat = text != "off"
        self._talk.messages.clear()

    def _set_system(self, text: str) -> None:
        self._talk.system = text
        if text and not self._talk.chat:
            self._talk.chat = True
            self._say("(chat is on)")

    def _reset(self, text: str) -> None:
        del text
        self._talk.messages.clear()

    def _retry(self, text: str) -> None:
        del text
        talk = self._talk
        if talk.last is None:
            self._say("nothing was asked yet")
            return
        if talk.chat and talk.messages[-2:-1] == [Message(role="user", content=talk.last)]:
            del talk.messages[-2:]
        self._ask(talk.last)

    def _count(self, text: str) -> None:
        try:
            self._say(f"{len(self._client.tokenize(text))} tokens")
        except ServingError as error:
            self._say(str(error))

    def _save(self, text: str) -> None:
        try:
            with Path(text).expanduser().open("x", encoding="utf-8") as file:
                file.write("\n".join(self._talk.said))
        except OSError as error:
            self._say(f"/save {text}: {error.strerror}")

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"there is no /{name}; {f'did you mean /{near[0]}?' if near else '/help lists all'}"


def printable(text: str) -> str:
    """``text`` without control characters, which could command the terminal."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\N{REPLACEMENT CHARACTER}"
        for c in text
    )
