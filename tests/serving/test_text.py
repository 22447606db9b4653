"""Streams of text: whole characters, garbage bytes, pieces that join, stop strings."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from serving.text import StopStrings, TextStream, pieces
from tests.serving.models import ByteCodec


class Words:
    """Tokens are words with a space between: a token's text depends on the one before."""

    vocab_size, eod = 100, 99

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(token) for token in ids)


def streamed(codec: ByteCodec | Words, ids: Sequence[int], context: Sequence[int] = ()) -> str:
    stream = TextStream(codec, context)
    return "".join([stream.push(token) for token in ids]) + stream.flush()


@pytest.mark.parametrize("text", ["plain", "é€😀", "a😀b", "日本語", "\N{REPLACEMENT CHARACTER}x"])
def test_streamed_text_is_the_text(text: str) -> None:
    assert streamed(ByteCodec(), ByteCodec().encode(text)) == text


def test_no_piece_ends_inside_a_character() -> None:
    stream = TextStream(ByteCodec())
    assert "\ufffd" not in "".join(stream.push(byte) for byte in "😀é€".encode())


def test_context_gives_the_space_before_the_first_word() -> None:
    assert streamed(Words(), [3, 4], context=[1, 2]) == " 3 4"
    assert streamed(Words(), [3, 4]) == "3 4"


def test_context_that_ends_inside_a_character() -> None:
    data = list("é".encode())
    assert streamed(ByteCodec(), data[1:], context=[65, data[0]]) == "é"


def test_garbage_comes_out_with_bounded_delay() -> None:
    stream, codec = TextStream(ByteCodec()), ByteCodec()
    shown = ""
    for count in range(1, 50):
        shown += stream.push(0xFF)
        assert len(shown) >= count - 3
    assert shown + stream.flush() == codec.decode([0xFF] * 49)


def test_random_bytes_lose_no_valid_character() -> None:
    source = random.Random(0)
    for _ in range(50):
        ids = [source.randrange(257) for _ in range(40)]
        letters = [c for c in ByteCodec().decode(ids) if c != "\ufffd"]
        assert [c for c in streamed(ByteCodec(), ids) if c != "\ufffd"] == letters


@pytest.mark.parametrize("codec", [ByteCodec(), Words()])
def test_pieces_join(codec: ByteCodec | Words) -> None:
    ids = codec.encode("12 3 45") if isinstance(codec, Words) else codec.encode("a😀b")
    found = pieces(codec, ids)
    assert len(found) == len(ids) and "".join(found) == codec.decode(ids)
    assert pieces(codec, []) == []


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
