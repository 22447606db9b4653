"""Conversations as text by a Jinja template, with the places of the assistant's answers.

Templates come from files, so they run in Jinja's sandbox: no attribute of Python's own, no
changed arguments, no files. The clock is not offered either: the same data give the same text.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mtk.data.chat_templates import BUILT_IN
from mtk.data.conversations import Conversation
from mtk.data.records import RecordError
from mtk.errors import ConfigError, DataError, Problem
from mtk.tokenizers import Tokenizer

# Private characters around what stands in a generation block; no text may hold them.
START, END = "\ue000", "\ue001"
Span = tuple[int, int]
# Templates ask whether these are none, not only whether they are defined.
NOT_GIVEN: Mapping[str, None] = {"tools": None, "documents": None}
# What a template may raise while it runs.
RENDERING = (
    TemplateError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    LookupError,
    RecursionError,
)


class _Generation(Extension):
    """``{% generation %}...{% endgeneration %}``, as transformers has it."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{START}{caller()}{END}"


@dataclass(frozen=True)
class ChatTemplate:
    """source: Jinja. name: for messages. tokens: special tokens by what templates call them,
    e.g. ``eos_token``."""

    source: str
    name: str
    tokens: Mapping[str, str]

    def render(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The text and where in it the assistant speaks, ends of its turns included.

        Raises RecordError where the template refuses a conversation, or does not tell where
        its answers are.
        """
        text = self._text(conversation)
        if START in text:
            return _take_marks(text)
        return text, self._by_prefixes(conversation, text)

    def question(self, conversation: Conversation) -> str:
        """The text that asks for the assistant's next answer. Raises RecordError."""
        return _take_marks(self._text(conversation, prompt=True))[0]

    def _by_prefixes(self, conversation: Conversation, whole: str) -> list[Span]:
        """An answer is what comes on top of the text that asks for it."""
        spans: list[Span] = []
        for index, message in enumerate(conversation):
            if message.role != "assistant":
                continue
            asked = self._text(conversation[:index], prompt=True)
            answered = self._text(conversation[: index + 1])
            if not answered.startswith(asked) or not whole.startswith(answered):
                raise RecordError(
                    "unclear answer",
                    f"the chat template {self.name} rewrites earlier turns, so where answer "
                    f"{len(spans) + 1} stands is not clear: put it between {{% generation %}} and "
                    f"{{% endgeneration %}} in a template of your own",
                )
            spans.append((len(asked), _end_of_turn(answered, message.content)))
        return spans

    def _text(self, conversation: Conversation, *, prompt: bool = False) -> str:
        messages = [{"role": m.role, "content": m.content} for m in conversation]
        try:
            return str(
                self._compiled.render(
                    messages=messages, add_generation_prompt=prompt, **NOT_GIVEN, **self.tokens
                )
            )
        except RENDERING as error:
            raise RecordError("refused by the chat template", f"{self.name}: {error}") from None

    @cached_property
    def _compiled(self) -> Any:
        return _environment().from_string(self.source)

    def check(self) -> None:
        """Raises DataError if the template is no Jinja."""
        try:
            _ = self._compiled
        except TemplateError as error:
            raise DataError(f"the chat template {self.name} does not parse: {error}.") from error


def _environment() -> ImmutableSandboxedEnvironment:
    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    return environment


def _take_marks(text: str) -> tuple[str, list[Span]]:
    pieces: list[str] = []
    spans: list[Span] = []
    length = 0
    for index, part in enumerate(text.split(START)):
        inside, _, outside = part.partition(END) if index else ("", "", part)
        if inside:
            spans.append((length, length + len(inside)))
        pieces += [inside, outside]
        length += len(inside) + len(outside)
    return "".join(pieces), spans


def _end_of_turn(answered: str, content: str) -> int:
    """Without the white space that some templates put between turns."""
    behind = answered.rfind(content.strip()) + len(content.strip())
    closing = answered[behind:].rstrip()
    return behind + len(closing) if closing else len(answered)


def choose_template(
    wanted: str | None, tokenizer: Tokenizer, model: str, *, key: str = "chat.chat_template"
) -> ChatTemplate:
    """The template of ``--chat-template``, else the tokenizer's own.

    model: where the tokenizer comes from. key: the option's name in the configuration. Raises
    ConfigError for an unknown name, or where none is known at all; DataError for one that does
    not parse.
    """
    tokens = special_names(tokenizer)
    if wanted is None:
        found = own_template(tokenizer)
        if found is None:
            rule = f"the tokenizer of {model} brings no chat template"
            fix = f"Choose one: {', '.join(BUILT_IN)}, or a file."
            raise ConfigError([Problem(key, None, rule, fix)])
        template = ChatTemplate(found, "of the tokenizer", tokens)
    elif wanted in BUILT_IN:
        template = ChatTemplate(BUILT_IN[wanted], wanted, tokens)
    else:
        template = ChatTemplate(_read(wanted, key), wanted, tokens)
    template.check()
    return template


def _read(wanted: str, key: str) -> str:
    path = Path(wanted)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        near = difflib.get_close_matches(wanted, BUILT_IN, n=1)
        rule = f"is neither one of {', '.join(BUILT_IN)} nor a file that can be read"
        fix = f"Did you mean {near[0]}?" if near else "Check the path."
        raise ConfigError([Problem(key, wanted, rule, fix)]) from error


def own_template(tokenizer: Tokenizer) -> str | None:
    """What travels with the tokenizer's files, or None."""
    if "chat_template.jinja" in tokenizer.extra:
        return tokenizer.extra["chat_template.jinja"].decode("utf-8", "replace")
    for name in ("chat_template.json", "tokenizer_config.json"):
        try:
            content = json.loads(tokenizer.extra.get(name, b"{}"))
        except ValueError:
            continue
        found = content.get("chat_template") if isinstance(content, dict) else None
        if isinstance(found, list):  # several, by name
            named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
            found = named.get("default")
        if isinstance(found, str):
            return found
    return None


def special_names(tokenizer: Tokenizer) -> dict[str, str]:
    """What templates call special tokens -> how the vocabulary spells them."""
    end = tokenizer.eod if tokenizer.eos is None else tokenizer.eos
    roles = {"bos": tokenizer.bos, "eos": end, "pad": tokenizer.pad}
    return {
        f"{role}_token": "" if token is None else tokenizer.piece(token)
        for role, token in roles.items()
    }
