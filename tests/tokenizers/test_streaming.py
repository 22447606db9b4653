"""Streaming never shows half a character and adds up to decoding at once."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mtk.tokenizers import Tokenizer, build_tokenizer
from mtk.tokenizers.streaming import StreamingDecoder, stream_text
from tests.tokenizers.samples import TRICKY, asset, bert_files, options, tiktoken_json, trained


@pytest.mark.parametrize("text", TRICKY, ids=range(len(TRICKY)))
@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece"])
def test_adds_up(kind: str, text: str) -> None:
    tokenizer = trained(kind)
    ids = tokenizer.encode(text)
    pieces = list(stream_text(tokenizer, ids))
    assert "".join(pieces) == tokenizer.decode(ids)
    assert "" not in pieces
    if kind != "wordpiece":
        assert not any("\ufffd" in piece for piece in pieces)


def test_characters_arrive_whole() -> None:
    tokenizer = trained("bpe", 257)  # bytes only
    decoder = StreamingDecoder(tokenizer)
    arrived = [decoder.feed(token) for token in tokenizer.encode("é🎉a")]
    assert arrived == ["", "é", "", "", "", "🎉", "a"]
    assert decoder.finish() == ""


def test_unfinished_and_invalid_bytes(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tiktoken_json(tmp_path))
    for data in (b"a\xf0\x9f", b"\xff\xfea", b"\xe2\x82a\x80"):
        ids = [byte + 1000 for byte in data]
        assert "".join(stream_text(tokenizer, ids)) == data.decode(errors="replace")


def test_specials_are_left_out() -> None:
    for kind in ("bpe", "wordpiece"):
        tokenizer = trained(kind)
        ids = [tokenizer.eod, *tokenizer.encode("the model"), tokenizer.eod]
        assert "".join(stream_text(tokenizer, ids)) == "the model"


@pytest.mark.parametrize("seed", range(20))
def test_random_ids(seed: int) -> None:
    tokenizer = trained("bpe")
    chosen = random.Random(seed)
    ids = [chosen.randrange(tokenizer.vocab_size) for _ in range(60)]
    plain = [token for token in ids if token != tokenizer.eod]
    assert "".join(stream_text(tokenizer, ids)) == tokenizer.decode(plain)


def check(tokenizer: Tokenizer) -> None:
    for text in TRICKY:
        ids = tokenizer.encode(text)
        pieces = list(stream_text(tokenizer, ids))
        assert "".join(pieces) == tokenizer.decode(ids)


def test_sentencepiece() -> None:
    model = str(asset("sentencepiece/botchan_en_bpe_1000.model"))
    pytest.importorskip("sentencepiece")
    check(build_tokenizer(options(tokenizer_type="Llama2Tokenizer", tokenizer_model=model)))


def test_bert(tmp_path: Path) -> None:
    check(build_tokenizer(bert_files(tmp_path)))
