"""Conversations in the spellings that datasets use, or the exact reason why a record is none.

The first that matches wins: ``messages`` (role, content), ``conversations`` (sharegpt's from,
value, or role, content), then a question and an answer in columns of their own (Alpaca, Dolly
and the like). A system message in the middle begins another conversation, as in Megatron-LM.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mtk.data.records import RecordError, bad_record, refusal
from mtk.data.sources import file_format, read_chunks
from mtk.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
# What else a role is called.
SPEAKERS: Mapping[str, str] = {
    **{role: role for role in ROLES},
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function": "tool",
}
QUESTIONS = ("prompt", "instruction", "question", "query")
CONTEXTS = ("input", "context")
SYSTEMS = ("system", "system_prompt")
ANSWERS = ("response", "output", "completion", "answer")


@dataclass(frozen=True)
class Message:
    role: str
    content: str


Conversation = tuple[Message, ...]
T = TypeVar("T")


class Place(NamedTuple):
    """Where a conversation stands. file: its number among the files. line: from 1 on (in a JSON
    array: the item). start, length: its bytes in the uncompressed file."""

    file: int
    line: int
    start: int
    length: int


def parse_conversations(raw: bytes) -> list[Conversation]:
    """The conversations of one JSON line. Raises RecordError."""
    record = _object(raw)
    for key in ("tools", "functions"):
        if record.get(key):
            raise RecordError("not text", f"the record has {key}, which templates are not given")
    if "messages" in record:
        messages = _messages(record["messages"], "messages", ("role",), ("content",))
    elif "conversations" in record:
        turns = record["conversations"]
        messages = _messages(turns, "conversations", ("from", "role"), ("value", "content"))
    else:
        messages = _columns(record)
    system = next((key for key in SYSTEMS if record.get(key)), None)
    if system is not None and messages[0].role != "system":
        messages.insert(0, Message("system", _text(record[system], repr(system))))
    found = list(_split_at_system(messages))
    for conversation in found:
        _check(conversation)
    return [_until_last_answer(conversation) for conversation in found]


def read_conversations(
    files: Sequence[Path], use: Callable[[Conversation], T], *, skip_bad: bool, bad: list[str]
) -> Iterator[tuple[Place, T]]:
    """What ``use`` makes of all conversations of JSONL files (also .gz, .zst) in order, and
    where each stands.

    use: may raise RecordError. bad: gets the place and reason of each line that ``skip_bad``
    leaves out. Raises DataError at the first one otherwise.
    """
    for path in files:
        if file_format(path)[0] not in (".jsonl", ".json"):
            raise DataError(f"{path}: conversations are read from .jsonl or .json files.")
    numbers = {str(path): number for number, path in enumerate(files)}
    for chunk in read_chunks(files, (), "file"):
        for index, raw in enumerate(chunk.records):
            if not raw.strip():
                continue
            try:
                found = [use(conversation) for conversation in parse_conversations(raw)]
            except RecordError as error:
                place = bad_record(chunk, index, error)
                if not skip_bad:
                    raise refusal(place) from None
                bad.append(str(place))
                continue
            line = Place(numbers[chunk.file], chunk.numbers[index], chunk.starts[index], len(raw))
            for one in found:
                yield line, one


def _object(raw: bytes) -> dict[str, Any]:
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise RecordError("invalid JSON", str(error)) from None
    if not isinstance(record, dict):
        raise RecordError("not an object", f"the record is a {type(record).__name__}, not {{...}}")
    return record


def _messages(
    value: Any, key: str, role_keys: Sequence[str], content_keys: Sequence[str]
) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise RecordError("no messages", f"{key!r} must be a list with at least one message")
    return [_message(item, n, role_keys, content_keys) for n, item in enumerate(value, start=1)]


def _message(
    item: Any, number: int, role_keys: Sequence[str], content_keys: Sequence[str]
) -> Message:
    where = f"message {number}"
    if not isinstance(item, dict):
        raise RecordError("not a message", f"{where} is a {type(item).__name__}, not {{...}}")
    for key in ("tool_calls", "function_call"):
        if item.get(key):
            raise RecordError("not text", f"{where} has {key}, which templates here do not write")
    if item.get("weight", 1) != 1:
        rule = f"{where} has a weight of {item['weight']!r}; every answer counts alike here"
        raise RecordError("unknown weight", rule)
    role = next((item[key] for key in role_keys if key in item), None)
    if role is None:
        raise RecordError("missing role", f"{where} has no {role_keys[0]!r}")
    if not isinstance(role, str) or role not in SPEAKERS:
        known = ", ".join(SPEAKERS)
        raise RecordError("unknown role", f"{where} has the role {role!r}; known are {known}")
    content = next((item[key] for key in content_keys if key in item), None)
    return Message(SPEAKERS[role], _text(content, where))


def _text(content: Any, where: str) -> str:
    """A text, or the texts of parts."""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        content = "".join(texts) if len(texts) == len(parts) else content
    if not isinstance(content, str):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise RecordError("not text", f"{where} has {found} where its text should be")
    try:
        content.encode()
    except UnicodeEncodeError:
        raise RecordError("lone surrogate", f"{where} holds half of a surrogate pair") from None
    return content


def _columns(record: Mapping[str, Any]) -> list[Message]:
    question = next((key for key in QUESTIONS if key in record), None)
    answer = next((key for key in ANSWERS if key in record), None)
    if question is None or answer is None:
        have = ", ".join(map(repr, list(record)[:8])) or "no keys"
        raise RecordError(
            "no conversation",
            f"neither 'messages' nor 'conversations' nor a question ({', '.join(QUESTIONS)}) with "
            f"an answer ({', '.join(ANSWERS)}); the record has {have}",
        )
    asked = _text(record[question], repr(question))
    context = next((key for key in CONTEXTS if record.get(key)), None)
    if context is not None:
        asked = f"{asked}\n\n{_text(record[context], repr(context))}"
    turns = [*_history(record), (asked, _text(record[answer], repr(answer)))]
    return [
        Message(role, text)
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def _history(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Questions and answers before the last ones, as pairs."""
    turns = record.get("history") or []
    for number, turn in enumerate(turns if isinstance(turns, list) else [turns], start=1):
        where = f"turn {number} of 'history'"
        if not isinstance(turn, list) or len(turn) != 2:
            raise RecordError("not a turn", f"{where} is no pair of a question and an answer")
        yield _text(turn[0], where), _text(turn[1], where)


def _split_at_system(messages: Sequence[Message]) -> Iterator[Conversation]:
    current: list[Message] = []
    for message in messages:
        if message.role == "system" and current:
            yield tuple(current)
            current = []
        current.append(message)
    yield tuple(current)


def _check(conversation: Conversation) -> None:
    answers = [message for message in conversation if message.role == "assistant"]
    if not answers:
        roles = ", ".join(message.role for message in conversation)
        raise RecordError("no answer", f"no message of an assistant among {roles}")
    if any(not message.content.strip() for message in answers):
        raise RecordError("empty answer", "a message of the assistant is empty")


def _until_last_answer(conversation: Conversation) -> Conversation:
    """Nothing is learned from what comes after it."""
    last = max(n for n, message in enumerate(conversation) if message.role == "assistant")
    return conversation[: last + 1]
