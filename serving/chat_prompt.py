"""Messages as a prompt, the way the model was taught: by its chat template."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mtk.data.chat_template import END, START, ChatTemplate, choose_template, own_template
from mtk.data.conversations import SPEAKERS, Message
from mtk.data.marked_text import GUARD, MarkedText
from mtk.data.records import RecordError
from mtk.errors import ServingError
from mtk.tokenizers import Tokenizer
from serving.body import checked_text, wrong_type
from serving.requests import StopRules

# OpenAI's newer name of the system role.
ROLES = {**SPEAKERS, "developer": "system"}
# What a message may hold beside role and content, as long as it is empty or only a name.
IGNORED = ("name", "refusal", "audio", "tool_calls", "function_call", "tool_call_id")
ANSWER = "answer"


@dataclass(frozen=True)
class ChatPrompt:
    """A template with the tokenizer that it is for. stop: what ends an answer."""

    template: ChatTemplate
    marked: MarkedText
    stop: StopRules

    def ids(self, messages: tuple[Message, ...]) -> tuple[int, ...]:
        """Raises ServingError (400) where the template refuses the messages."""
        if any(mark in m.content for m in messages for mark in (START, END, GUARD)):
            raise ServingError("U+E000 to U+E002 are kept for templates", param="messages")
        guarded = tuple(replace(m, content=self.marked.guard(m.content)) for m in messages)
        try:
            text = self.template.question(guarded)
        except RecordError as error:
            raise ServingError(str(error), param="messages") from None
        found = tuple(self.marked.ids(text))
        if not found:
            raise ServingError("the messages make an empty prompt", param="messages")
        return found


def open_chat(wanted: str | None, tokenizer: Tokenizer, model: str) -> ChatPrompt | None:
    """By the template of ``--chat-template``, else the tokenizer's own; None without one.

    Raises ConfigError for an unknown template, DataError for one that does not parse.
    """
    if wanted is None and own_template(tokenizer) is None:
        return None
    template = choose_template(wanted, tokenizer, model, key="chat_template")
    marked = MarkedText(tokenizer)
    return ChatPrompt(template, marked, _end_of_answer(template, tokenizer, marked))


def _end_of_answer(template: ChatTemplate, tokenizer: Tokenizer, marked: MarkedText) -> StopRules:
    """The end of a document, and what the template writes behind an answer."""
    ids = {tokenizer.eod} | ({tokenizer.eos} if tokenizer.eos is not None else set())
    try:
        text, spans = template.render((Message("user", "question"), Message("assistant", ANSWER)))
    except RecordError:
        # A template that wants other messages, or does not tell; the end of a document remains.
        return StopRules(token_ids=frozenset(ids))
    start, end = spans[-1]
    _, _, closing = text[start:end].rpartition(ANSWER)
    closing = closing.strip()
    tokens = marked.ids(closing) if closing else []
    if len(tokens) == 1:
        return StopRules(token_ids=frozenset({*ids, tokens[0]}))
    return StopRules(token_ids=frozenset(ids), strings=(closing,) if closing else ())


def parse_messages(value: Any) -> tuple[Message, ...]:
    """Raises ServingError (400) that names the message."""
    if value is None:
        raise ServingError("messages is required: a list of messages", param="messages")
    if not isinstance(value, list):
        raise wrong_type("messages", value, "a list of messages")
    if not value:
        raise ServingError("messages is an empty list", param="messages")
    return tuple(_message(item, f"messages[{at}]") for at, item in enumerate(value))


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise _wrong(where, "must be an object with role and content")
    for name, value in item.items():
        if name in ("role", "content"):
            continue
        if name not in IGNORED:
            raise _wrong(where, f"has the unknown field {name[:40]!r}")
        if value and name != "name":
            raise _wrong(where, f"has {name}, which chat templates are not given here")
    role = item.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise _wrong(where, f"has no role among {', '.join(ROLES)}")
    return Message(ROLES[role], _content(item.get("content"), where))


def _content(content: Any, where: str) -> str:
    """A text, or the texts of parts of type text."""
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text":
                raise _wrong(where, "has a part that is no text ({type: text, text: ...})")
        content = "".join(checked_text("messages", part.get("text")) for part in content)
    if not isinstance(content, str):
        raise _wrong(where, "has no text as its content")
    return checked_text("messages", content)


def _wrong(where: str, rule: str) -> ServingError:
    return ServingError(f"{where} {rule}", param="messages")
