"""Conversations: spellings, refusals, templates, and which tokens count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mtk.data.chat_corpus import encode_conversation
from mtk.data.chat_template import ChatTemplate, choose_template, special_names
from mtk.data.chat_templates import BUILT_IN
from mtk.data.conversations import Conversation, Message, parse_conversations, read_conversations
from mtk.data.marked_text import MarkedText
from mtk.data.records import RecordError
from mtk.errors import ConfigError, DataError
from mtk.tokenizers import Tokenizer, build_tokenizer
from tests.tokenizers.samples import gpt2_files, trained

TALK = (
    Message("system", "Be brief."),
    Message("user", "the model?"),
    Message("assistant", "reads a token"),
    Message("user", "and then"),
    Message("assistant", " the loss — falls\n"),
)


def parsed(record: dict[str, Any]) -> list[list[tuple[str, str]]]:
    found = parse_conversations(json.dumps(record).encode())
    return [[(m.role, m.content) for m in conversation] for conversation in found]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [{"role": "user", "content": "q"}, {"role": "model", "content": "a"}]},
        {"prompt": "q", "response": "a"},
        {"prompt": "q", "completion": "a"},
        {"instruction": "q", "input": "", "output": "a"},
        {"question": "q", "answer": "a"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]},
                      {"role": "assistant", "content": "a"},
                      {"role": "user", "content": "never answered"}]},
    ],
)  # fmt: skip
def test_spellings(record: dict[str, Any]) -> None:
    assert parsed(record) == [[("user", "q"), ("assistant", "a")]]


def test_first_match_wins_and_contexts_are_part_of_the_question() -> None:
    both = {"messages": [{"role": "assistant", "content": "m"}], "prompt": "p", "response": "r"}
    assert parsed(both) == [[("assistant", "m")]]
    dolly = {"instruction": "q", "context": "c", "response": "a", "system": "s"}
    assert parsed(dolly) == [[("system", "s"), ("user", "q\n\nc"), ("assistant", "a")]]


def test_systems_and_turns_in_columns_of_their_own() -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    expected = [("system", "s"), ("user", "q"), ("assistant", "a")]
    for record in (
        {"conversations": turns, "system": "s"},
        {"conversations": [{"from": "system", "value": "s"}, *turns], "system": "other"},
        {"question": "q", "response": "a", "system_prompt": "s"},
    ):
        assert parsed(record) == [expected]
    alpaca = {"instruction": "q", "output": "a", "history": [["q0", "a0"]]}
    assert parsed(alpaca) == [[("user", "q0"), ("assistant", "a0"), *expected[1:]]]


def test_a_system_message_begins_another_conversation() -> None:
    def turn(role: str) -> dict[str, str]:
        return {"role": role, "content": role}

    roles = ["system", "user", "assistant", "system", "assistant"]
    found = parsed({"messages": [turn(role) for role in roles]})
    assert [[role for role, _ in one] for one in found] == [roles[:3], roles[3:]]


BAD = [
    ("not JSON", "invalid JSON"),
    ("[1]", "not an object"),
    ('{"messages": []}', "no messages"),
    ('{"messages": [{"content": "a"}]}', "message 1 has no 'role'"),
    ('{"messages": [{"role": "wizard", "content": "a"}]}', "role 'wizard'; known are system"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "no message of an assistant among user"),
    ('{"messages": [{"role": "assistant", "content": " \\n"}]}', "empty answer"),
    ('{"messages": [{"role": "assistant", "content": null}]}', "message 1 has nothing"),
    ('{"messages": [{"role": "assistant", "content": 3}]}', "a int where its text"),
    ('{"messages": [{"role": "assistant", "content": "\\ud800"}]}', "lone surrogate"),
    ('{"messages": [{"role": "assistant", "content": "a", "weight": 0}]}', "weight of 0"),
    ('{"messages": [{"role": "assistant", "tool_calls": [1]}]}', "tool_calls"),
    ('{"messages": ["a"]}', "message 1 is a str"),
    ('{"text": "a"}', "neither 'messages' nor 'conversations'.*the record has 'text'"),
    ('{"prompt": "a"}', "neither"),
    ('{"prompt": "a", "response": "b", "tools": [1]}', "the record has tools"),
    ('{"prompt": "a", "response": "b", "history": ["c"]}', "turn 1 of 'history' is no pair"),
    ('{"prompt": "a", "response": ""}', "empty answer"),
]


@pytest.mark.parametrize(("line", "words"), BAD)
def test_bad_lines_name_their_place(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "talk.jsonl"
    good = '{"prompt": "q", "response": "a"}\n'
    path.write_text(f"{good}{line}\n{good}")
    with pytest.raises(DataError, match=rf"talk.jsonl, line 2 \(byte .*{words}"):
        list(read_conversations([path], lambda c: c, skip_bad=False, bad=[]))
    bad: list[str] = []
    found = list(read_conversations([path], lambda c: c, skip_bad=True, bad=bad))
    assert len(found) == 2 and len(bad) == 1


def tokenizers(folder: Path) -> dict[str, Tokenizer]:
    return {
        "byte-level": trained("bpe"),  # looks for no special tokens in texts
        "unigram": trained("unigram"),
        "gpt2": build_tokenizer(gpt2_files(folder)),
    }


@pytest.mark.parametrize("template", [*BUILT_IN, "prefixes"])
@pytest.mark.parametrize("kind", ["byte-level", "unigram", "gpt2"])
def test_exactly_the_answers_count(tmp_path: Path, kind: str, template: str) -> None:
    tokenizer = tokenizers(tmp_path)[kind]
    source = BUILT_IN.get(template, BUILT_IN["chatml"])
    if template == "prefixes":
        source = source.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    chat = ChatTemplate(source, template, special_names(tokenizer))
    text, spans = chat.render(TALK)
    ids, counted = encode_conversation(TALK, chat, MarkedText(tokenizer))
    assert tokenizer.decode(ids) == text
    assert [text[a:b] for a, b in spans] == runs_of(tokenizer, ids, counted)
    ends = {"chatml": "<|im_end|>", "prefixes": "<|im_end|>", "llama3": "<|eot_id|>"}
    end = ends.get(template, tokenizer.piece(tokenizer.eod))
    said = [m.content for m in TALK if m.role == "assistant"]
    for answer, found in zip(said, runs_of(tokenizer, ids, counted), strict=True):
        assert found.endswith(end) and found.removesuffix(end).strip() == answer.strip()
    if template == "plain":
        assert ids.count(tokenizer.eod) == len(said)


def runs_of(tokenizer: Tokenizer, ids: list[int], counted: list[bool]) -> list[str]:
    """The text of each run of ids that count."""
    runs: list[list[int]] = []
    before = False
    for token, counts in zip(ids, counted, strict=True):
        if counts and not before:
            runs.append([])
        if counts:
            runs[-1].append(token)
        before = counts
    return [tokenizer.decode(run) for run in runs]


def test_a_message_cannot_forge_special_tokens(tmp_path: Path) -> None:
    for tokenizer in (trained("bpe"), build_tokenizer(gpt2_files(tmp_path))):
        end = tokenizer.piece(tokenizer.eod)
        forged: Conversation = (Message("user", f"a{end}b"), Message("assistant", f"c{end}"))
        chat = ChatTemplate(BUILT_IN["plain"], "plain", special_names(tokenizer))
        ids, _ = encode_conversation(forged, chat, MarkedText(tokenizer))
        assert ids.count(tokenizer.eod) == 1
        assert tokenizer.decode(ids) == chat.render(forged)[0]


def test_an_answer_that_would_merge_with_its_prompt(tmp_path: Path) -> None:
    """The border stays: the prompt is encoded as it will be when the model is asked."""
    tokenizer = build_tokenizer(gpt2_files(tmp_path))
    marked = MarkedText(tokenizer)
    ids, counted = marked.encode("the model", [(1, 9)])
    assert tokenizer.encode("the")[0] not in ids[:1]
    assert [tokenizer.decode([t]) for t, c in zip(ids, counted, strict=True) if not c] == ["t"]
    assert tokenizer.decode(ids) == "the model"


def test_templates_equal_transformers() -> None:
    render = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": ""}
    messages = [{"role": m.role, "content": m.content} for m in TALK]
    asks = "{% if tools is not none or documents is not none %}never{% endif %}"
    lists = "{{ messages | tojson(indent=1, sort_keys=true, separators=(',', '=')) }}"
    marked = "{% generation %}{{ tools }}{% endgeneration %}"
    for name, source in {**BUILT_IN, "own": asks + lists + marked}.items():
        texts, spans = render(
            [messages], chat_template=source, return_assistant_tokens_mask=True, **tokens
        )
        assert (texts[0], spans[0]) == ChatTemplate(source, name, tokens).render(TALK), name


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ messages[0].content.__class__.__mro__ }}", "refused by the chat template|unclear"),
        ("{{ raise_exception('no system here') }}", "no system here"),
        ("{{ messages.append(1) }}", "refused by the chat template"),
        ("{{ messages | length }}", "rewrites earlier turns"),
        ("{% for i in range(10**9) %}{% endfor %}", "refused"),
        ("{% include '/etc/passwd' %}", "refused by the chat template"),
        ("{{ messages[99].content }}", "refused|unclear"),
    ],
)
def test_templates_are_kept_in_their_sandbox(source: str, words: str) -> None:
    with pytest.raises(RecordError, match=words):
        ChatTemplate(source, "test", {}).render(TALK)


def test_choosing_a_template(tmp_path: Path) -> None:
    tokenizer = trained("bpe")
    with pytest.raises(ConfigError, match=r"brings no chat template.*chatml, llama3, plain"):
        choose_template(None, tokenizer, "model")
    with pytest.raises(ConfigError, match="Did you mean chatml"):
        choose_template("chatlm", tokenizer, "model")
    (tmp_path / "broken.jinja").write_text("{% for %}")
    with pytest.raises(DataError, match=r"broken.jinja does not parse"):
        choose_template(str(tmp_path / "broken.jinja"), tokenizer, "model")
    config = json.dumps({"chat_template": [{"name": "default", "template": "own"}]})
    tokenizer.extra["tokenizer_config.json"] = config.encode()
    assert choose_template(None, tokenizer, "model").source == "own"
    assert choose_template("plain", tokenizer, "model").source == BUILT_IN["plain"]
