"""Streams of text: whole characters, garbage bytes, pieces that join, stop strings."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from mtk.tokenizers import Tokenizer, load_tokenizer
from mtk.tokenizers.null import NullTokenizer
from serving.text import StopStrings, TextStream, pieces
from tests.serving.models import ByteTokenizer
from tests.serving.t5_directory import t5_tokenizer


def words() -> NullTokenizer:
    """Tokens are numbers with a space between: a token's text depends on the one before."""
    return NullTokenizer({"vocab_size": 100, "eod": None})


def streamed(tokenizer: Tokenizer, ids: Sequence[int], context: Sequence[int] = ()) -> str:
    stream = TextStream(tokenizer, context)
    return "".join([stream.push(token) for token in ids]) + stream.flush()


@pytest.mark.parametrize("text", ["plain", "é€😀", "a😀b", "日本語", "\N{REPLACEMENT CHARACTER}x"])
def test_streamed_text_is_the_text(text: str) -> None:
    assert streamed(ByteTokenizer(), ByteTokenizer().encode(text)) == text


def test_no_piece_ends_inside_a_character() -> None:
    stream = TextStream(ByteTokenizer())
    assert "\ufffd" not in "".join(stream.push(byte) for byte in "😀é€".encode())


def test_context_gives_the_space_before_the_first_word() -> None:
    assert streamed(words(), [3, 4], context=[1, 2]) == " 3 4"
    assert streamed(words(), [3, 4]) == "3 4"


def test_context_that_ends_inside_a_character() -> None:
    data = list("é".encode())
    assert streamed(ByteTokenizer(), data[1:], context=[65, data[0]]) == "é"


def test_garbage_is_what_decoding_at_once_gives() -> None:
    source = random.Random(0)
    for _ in range(50):
        ids = [source.randrange(257) for _ in range(40)]
        assert streamed(ByteTokenizer(), ids) == ByteTokenizer().decode(ids)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), words()])
def test_pieces_join(tokenizer: Tokenizer) -> None:
    ids = (
        tokenizer.encode("12 3 45")
        if isinstance(tokenizer, NullTokenizer)
        else tokenizer.encode("a😀b")
    )
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids) and "".join(found) == tokenizer.decode(ids)
    assert pieces(tokenizer, []) == []


@pytest.mark.parametrize("seed", range(30))
def test_stop_strings_equal_a_search_in_the_whole_text(seed: int) -> None:
    source = random.Random(seed)
    stops = ["".join(source.choices("ab", k=source.randint(1, 4))) for _ in range(2)]
    text = "".join(source.choices("abc", k=25))
    stopper, shown, stopped = StopStrings(stops), "", False
    rest = text
    while rest and not stopped:
        size = source.randint(1, 3)
        part, stopped = stopper.push(rest[:size])
        shown, rest = shown + part, rest[size:]
    shown += "" if stopped else stopper.flush()
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    assert stopped == bool(found)
    # The first stop that is complete decides; a longer one may begin earlier.
    firsts = {text[: text.find(s)] for s in stops if s in text} or {text}
    assert shown in firsts


def test_space_around_sentinels_is_the_tokenizers(tmp_path: Path) -> None:
    """Streamed text is that of all ids at once, special tokens and the space behind them too."""
    t5_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode_framed("the quick <extra_id_0> fox<extra_id_1> jumps no")
    assert tokenizer.eos == ids[-1] and set(tokenizer.extra_ids[:2]) <= set(ids)
    whole = tokenizer.decode(ids)
    assert "<extra_id_0> fox" in whole
    assert "".join(pieces(tokenizer, ids)) == whole
    stream = TextStream(tokenizer)
    assert "".join([*map(stream.push, ids), stream.flush()]) == whole
