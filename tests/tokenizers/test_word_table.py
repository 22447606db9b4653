"""Words looked up by compiled code: the tokenizer's ids, whatever the texts and windows."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")

from mtk.errors import DataError
from mtk.tokenizers import Tokenizer, word_cache, word_table
from mtk.tokenizers.engines import choose_engine
from mtk.tokenizers.flat import ReferenceEncoder
from mtk.tokenizers.library import BertWordPieceCase
from mtk.tokenizers.sentencepiece_model import GPTSentencePieceTokenizer
from mtk.tokenizers.word_cache import WordCacheEncoder
from mtk.tokenizers.word_table import WordTable, piece_cuts, wordpiece_cuts
from tests.tokenizers.samples import CORPUS, trained
from tests.tokenizers.test_engines import TEXTS, every_code_point, mixtures, sentencepiece_model

ODD = (
    *("x" * 300, "!" * 300, "a\x01b c\x7f.d e\x1cf\n\x0bg h\x0ci.j", "", " ", "\n", "é", "a"),
    *("a b", " a  b ", "a\tb\n\nc", "a é b", "e\u0301 e\u0301", "a\u00a0b c", "(a),(b)", "\t a"),
)
SENTENCEPIECE: dict[str, dict[str, Any]] = {
    "standard": {"byte_fallback": True},
    "as Llama": {"byte_fallback": True, "normalization_rule_name": "identity",
                 "remove_extra_whitespaces": False, "user_defined_symbols": ["▁▁", "▁▁▁▁"]},
    "without bytes": {"vocab_size": 60},
    "folded": {"normalization_rule_name": "nfkc_cf", "vocab_size": 60},
    "with symbols": {"vocab_size": 70, "user_defined_symbols": ["(a", "=>", "1-2", "xyz"]},
}  # fmt: skip


def sentencepiece(name: str) -> GPTSentencePieceTokenizer:
    model = sentencepiece_model(model_type="bpe", **SENTENCEPIECE[name])
    return GPTSentencePieceTokenizer({"add_bos": False}, {"tokenizer.model": model})


def tables() -> dict[str, Tokenizer]:
    base = trained("wordpiece")
    return {
        "wordpiece": base,
        "wordpiece, cased": BertWordPieceCase(base.options, base.files),
        **{name: sentencepiece(name) for name in SENTENCEPIECE},
    }


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return tables()


def table_of(tokenizer: Tokenizer) -> WordTable:
    encoder = choose_engine(tokenizer, "words")
    assert isinstance(encoder, WordCacheEncoder)
    table = encoder._compiled()
    assert isinstance(table, WordTable)
    return table


def assert_same(tokenizer: Tokenizer, table: WordTable, texts: list[str]) -> None:
    ids, lengths = table.encode(texts)
    right, right_lengths = ReferenceEncoder(tokenizer).encode(texts)
    wrong = np.flatnonzero(lengths != right_lengths)
    assert not len(wrong), repr(texts[wrong[0]])
    assert np.array_equal(ids, right)


def punctuated(count: int) -> list[str]:
    """Words, marks and symbols glued to each other: where a word may be cut inside."""
    rng = random.Random(3)
    bits = [*" ".join(CORPUS[:3]).split(), *"()[]{},.;:=><-+*/'\"!?0123456789AZaexyz", "(a", "=>"]
    bits += ["1-2", "xyz", "é", "\u0301", "▁", "\u200b", "Å", "A\u030a", "日", "▁▁"]
    return [
        "".join(rng.choice(bits) + rng.choice(("", "", " ")) for _ in range(rng.randrange(30)))
        for _ in range(count)
    ]


@pytest.mark.parametrize("name", ["wordpiece", "wordpiece, cased", *SENTENCEPIECE])
def test_the_ids_are_the_tokenizers(name: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[name]
    table = table_of(tokenizer)
    texts = [*TEXTS, *ODD, *every_code_point()[::7], *punctuated(1500)]
    assert_same(tokenizer, table, texts)
    assert_same(tokenizer, table, texts[::-1])  # by now it has seen all words
    assert_same(tokenizer, table, [])


@pytest.mark.parametrize("name", ["wordpiece", "standard"])
def test_small_windows_full_tables_and_forgetting(
    name: str, tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(word_table, "WINDOW", 5)
    monkeypatch.setattr(word_table, "FIRST_WORDS", 4)
    monkeypatch.setattr(word_table, "FIRST_BYTES", 8)
    tokenizer, usual = tokenizers[name], table_of(tokenizers[name])
    texts = [*mixtures(60, seed=5), *ODD, *CORPUS]
    grows = WordTable(usual._encode, usual._cuts)
    assert_same(tokenizer, grows, texts)
    assert len(grows) > 100
    forgets = WordTable(usual._encode, usual._cuts, limit=2000)
    assert_same(tokenizer, forgets, [*texts, "é" * 5000, *texts])  # a word above the limit
    assert len(forgets) < 100


def test_words_are_encoded_once(tokenizers: dict[str, Tokenizer]) -> None:
    calls: list[str] = []

    def encode(words: Any) -> list[list[int]]:
        calls.extend(words)
        return tokenizers["standard"].encode_batch(words)

    usual = table_of(tokenizers["standard"])
    table = WordTable(encode, usual._cuts)
    for _ in range(3):
        table.encode(CORPUS)
    assert len(calls) == len(table) + len(table._leads) <= 2 * len({*" ".join(CORPUS).split()})


def test_a_failure_leaves_no_words_without_ids(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["wordpiece"]
    fails = [True]

    def encode(words: Any) -> list[list[int]]:
        if fails.pop() if fails else False:
            raise MemoryError
        return tokenizer.encode_batch(words)

    table = WordTable(encode, wordpiece_cuts())
    with pytest.raises(MemoryError):
        table.encode(CORPUS)
    assert_same(tokenizer, table, CORPUS)
    with pytest.raises(DataError, match="surrogate"):
        table.encode(["a\ud800"])
    assert_same(tokenizer, table, CORPUS)


def test_cuts_inside_words(tokenizers: dict[str, Tokenizer]) -> None:
    """Only where no piece goes on, between characters that are pieces and stay what they are."""
    cuts = piece_cuts(["a", "b", "(", "(a", "c", "▁b"], b" ", ["a", "b", "("]).inside
    pairs = {chr(at // 256) + chr(at % 256) for at in np.flatnonzero(cuts)}
    assert pairs == {"aa", "ab", "a(", "ba", "bb", "b(", "(b", "(("}  # not "(a", no "c"
    folded = table_of(tokenizers["folded"])._cuts.inside.reshape(256, 256)  # type: ignore[union-attr]
    assert not folded[ord("A") : ord("Z") + 1].any()  # they become others
    assert folded[ord("x")].any() is not None
    standard = table_of(tokenizers["standard"])._cuts.inside  # type: ignore[union-attr]
    assert standard.any()


def test_own_normalization_rules_cut_nothing_inside(
    tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(word_cache, "KNOWN_RULES", frozenset([b"nfc"]))
    assert not table_of(tokenizers["standard"])._cuts.inside.any()  # type: ignore[union-attr]


def test_long_corpora_take_it_and_short_ones_do_not(
    tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(word_cache, "COMPILED_FROM", 2000)
    tokenizer = tokenizers["wordpiece"]
    encoder = choose_engine(tokenizer)
    right = ReferenceEncoder(tokenizer).encode(CORPUS)[0].tolist()
    taken = []
    for _ in range(4):
        assert encoder.encode(CORPUS)[0].tolist() == right
        taken.append(encoder._table is not None)  # type: ignore[attr-defined]
    assert taken == [False, True, True, True]
    monkeypatch.setattr(word_cache, "numba_is_installed", lambda: False)
    encoder = choose_engine(tokenizer)
    for _ in range(4):
        assert encoder.encode(CORPUS)[0].tolist() == right
    assert encoder._table is None  # type: ignore[attr-defined]


def codes(words: np.ndarray[Any, Any], seed: int) -> np.ndarray[Any, Any]:
    """The table's hash of words [N, bytes], in plain numpy."""
    code = np.full(len(words), seed, np.uint64)
    for column in words.T:
        code = (code ^ column.astype(np.uint64)) * np.uint64(0x100000001B3)
    return (code ^ (code >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)


def test_words_that_collide_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two words with the same half of the hash that a slot keeps, in the same slot."""
    monkeypatch.setattr(word_table, "FIRST_WORDS", 4)
    slots = 4 * word_table.SLOTS
    words = np.random.default_rng(0).integers(ord("a"), ord("z") + 1, (800_000, 9), np.uint8)
    code = codes(words, 0xCBF29CE484222325)
    kept = (code & ~np.uint64(0xFFFFFFFF)) | (code & np.uint64(slots - 1))
    order = np.argsort(kept, kind="stable")
    same = np.flatnonzero(kept[order][1:] == kept[order][:-1])
    pairs = [(words[order[at]].tobytes(), words[order[at + 1]].tobytes()) for at in same]
    pairs = [(first.decode(), second.decode()) for first, second in pairs if first != second]
    assert pairs
    for first, second in pairs:
        table = WordTable(lambda found: [list(word.encode()) for word in found], wordpiece_cuts())
        ids, lengths = table.encode([first, second, first])
        assert bytes(ids.astype(np.uint8)).decode() == first + second + first
        assert lengths.tolist() == [9, 9, 9]
        assert len(table._slots) == slots
