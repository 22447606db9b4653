"""Engines give the tokenizer's ids: every code point, odd mixtures, every proven rule."""

from __future__ import annotations

import base64
import io
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from mtk.errors import ConfigError, DataError
from mtk.tokenizers import Tokenizer, build_tokenizer, fastokens_engine, word_cache
from mtk.tokenizers.byte_level import piece_bytes
from mtk.tokenizers.engines import choose_engine
from mtk.tokenizers.fastokens_engine import PROVEN_RULES
from mtk.tokenizers.flat import ReferenceEncoder
from mtk.tokenizers.huggingface import HuggingFaceTokenizer
from mtk.tokenizers.protobuf import fields
from mtk.tokenizers.sentencepiece_model import GPTSentencePieceTokenizer, SentencePieceTokenizer
from mtk.tokenizers.tiktoken_ranks import MODEL, PATTERNS, TikTokenizer, resolve_options
from mtk.tokenizers.word_cache import WordCache
from tests.tokenizers.samples import CORPUS, TRICKY, gpt2_files, trained

BLOCKS = (
    *((0x20, 0x7F), (0, 0x20), (0x80, 0x250), (0x2B0, 0x370), (0x370, 0x530), (0x590, 0x700)),
    *((0x900, 0x980), (0x1100, 0x1200), (0x1680, 0x1681), (0x180B, 0x1810), (0x2000, 0x2100)),
    *((0x2150, 0x2190), (0x2460, 0x2600), (0x3000, 0x3100), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3)),
    *((0xE000, 0xE100), (0xFB00, 0xFFFE), (0x10000, 0x10350), (0x1D400, 0x1D800)),
    *((0x1F300, 0x1FA00), (0x20000, 0x20100), (0xE0000, 0xE0080), (0x10FFF0, 0x110000)),
)
BITS = (
    *("'s", "'S", "'re", "'LL", "'ſ", "'ve", "\r\n", "\n\n", " ", "  ", "\t", "\xa0", "\u2028"),
    *("\u3000", "\x85", "123", "1234567", "٣٤", "½", "²", "Ⅷ", "<|endoftext|>", "</s>", "é", "İ"),
    *("ǅ", "👩‍👩‍👧", "\u202e", "\ufeff", "\0", "''", "...", "!?\n", "/\n", "\u200d", "\u180e"),
    *("▁", "▁▁", "\x1c", "\x0b", "<unk>", "[UNK]", "##ing", "don't", "I'M", "¨", "ﬁ", "\u0301"),
)


def mixtures(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = " ".join(CORPUS).split(" ")

    def one() -> str:
        kind = rng.random()
        if kind < 0.35:
            return rng.choice(words)
        if kind < 0.65:
            return rng.choice(BITS)
        if kind < 0.75:
            return rng.choice(" \n\r\t") * rng.randrange(1, 8)
        first, last = rng.choice(BLOCKS)
        return "".join(chr(rng.randrange(first, last)) for _ in range(rng.randrange(1, 6)))

    return [
        "".join(one() + rng.choice(("", " ")) for _ in range(rng.randrange(60)))
        for _ in range(count)
    ]


def every_code_point() -> list[str]:
    points = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    return [
        "".join(f"{c} {c}1{c}\n{c}" for c in points[i : i + 64]) for i in range(0, len(points), 64)
    ]


TEXTS = [*TRICKY, *mixtures(600), *CORPUS]


def assert_same(tokenizer: Tokenizer, engine: str, texts: list[str]) -> None:
    found, lengths = choose_engine(tokenizer, engine).encode(texts)
    right, right_lengths = ReferenceEncoder(tokenizer).encode(texts)
    wrong = [i for i, (a, b) in enumerate(zip(lengths, right_lengths, strict=True)) if a != b]
    assert not wrong, repr(texts[wrong[0]])
    assert found.tolist() == right.tolist()
    assert len(texts) == len(lengths)


@cache
def crossing() -> HuggingFaceTokenizer:
    """BPE that learnt without a splitting rule: its merges reach over every boundary between
    scripts, blanks and marks, so that a text cut elsewhere has other ids."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [piece for text in mixtures(1500, seed=1) for piece in windows(text)]
    library.train_from_iterator(texts, trainer)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    options = trained("bpe").options
    return HuggingFaceTokenizer(options, {"tokenizer.json": library.to_str().encode()})


def windows(text: str) -> list[str]:
    """Short pieces, for a trainer whose words are whole texts."""
    return [text[i : i + 12] for i in range(0, len(text), 6)]


def with_rule(rule: str | None, **changes: Any) -> HuggingFaceTokenizer:
    """That BPE with another splitting rule or other parts."""
    base = crossing()
    description = json.loads(base.library.to_str())
    library = Library.from_str(json.dumps(description | changes))
    if rule is not None:
        split = pre_tokenizers.Split(Regex(rule), "isolated", invert=False)
        spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.pre_tokenizer = pre_tokenizers.Sequence([split, spelling])
    return HuggingFaceTokenizer(base.options, {"tokenizer.json": library.to_str().encode()})


@pytest.mark.parametrize("rule", [None, *sorted(PROVEN_RULES)])
def test_byte_level_bpe(rule: str | None) -> None:
    assert_same(with_rule(rule), "fastokens", TEXTS)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [None, *sorted(PROVEN_RULES)])
def test_every_code_point(rule: str | None) -> None:
    """Each rule on its share: together they see all of them, and any rule all kinds."""
    share = [None, *sorted(PROVEN_RULES)].index(rule)
    assert_same(with_rule(rule), "fastokens", every_code_point()[share::5])


def test_parts_that_are_proven() -> None:
    model = json.loads(with_rule(None).library.to_str())["model"]
    assert_same(with_rule(None, model=model | {"ignore_merges": True}), "fastokens", TEXTS)
    nfc = with_rule(None)
    nfc.library.normalizer = normalizers.NFC()
    assert_same(nfc, "fastokens", TEXTS)


def test_what_is_not_proven_is_left_to_the_tokenizer() -> None:
    model = json.loads(with_rule(None).library.to_str())["model"]
    token = {"id": 0, "content": "the", "special": False, "single_word": True}
    token |= {"lstrip": False, "rstrip": False, "normalized": True}
    unproven = [
        with_rule(PATTERNS["cl100k"]),  # tokenizers reads {1,3}+ in another way
        with_rule(r"\w+|\W+"),
        with_rule(None, model=model | {"dropout": 0.1}),
        with_rule(None, normalizer={"type": "Lowercase"}),
        with_rule(None, added_tokens=[token]),
    ]
    for tokenizer in unproven:
        assert choose_engine(tokenizer).name == "reference"
        with pytest.raises(ConfigError, match="not proven"):
            choose_engine(tokenizer, "fastokens")
    template = HuggingFaceTokenizer(
        with_rule(None).options | {"include_special_tokens": True}, with_rule(None).files
    )
    assert choose_engine(template).name == "reference"
    named = HuggingFaceTokenizer(
        with_rule(None).options | {"split_special_tokens": False}, with_rule(None).files
    )
    assert choose_engine(named).name == "reference"
    assert choose_engine(trained("unigram")).name == "reference"


def test_gpt2_files(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(gpt2_files(tmp_path))
    assert choose_engine(tokenizer).name == "fastokens"
    assert_same(tokenizer, "auto", TEXTS)


def ranks() -> bytes:
    model = json.loads(with_rule(None).library.to_str())["model"]
    pieces = dict.fromkeys(bytes([byte]) for byte in range(256))
    for merge in model["merges"]:
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        piece = (piece_bytes(left) or b"") + (piece_bytes(right) or b"")
        pieces[piece] = None
    return json.dumps(
        [
            {"rank": i, "token_bytes": base64.b64encode(p).decode(), "token_str": None}
            for i, p in enumerate(pieces)
        ]
    ).encode()


def test_the_texts_tell_rules_apart() -> None:
    """A test of engines sees nothing if ids do not depend on where a text is cut."""
    rules = [None, *sorted(PROVEN_RULES)]
    found = [ReferenceEncoder(with_rule(rule)).encode(TEXTS)[0].tolist() for rule in rules]
    assert len({tuple(ids) for ids in found}) == len(rules)


@pytest.mark.parametrize("pattern", sorted(PATTERNS))
def test_ranks(pattern: str) -> None:
    data = ranks()
    options = resolve_options(data, pattern=pattern, num_special=10)
    tokenizer = TikTokenizer(options, {MODEL: data})
    assert_same(tokenizer, "fastokens", [*TEXTS, *every_code_point()[::7]])
    assert max(choose_engine(tokenizer).encode(TEXTS)[0]) >= 266  # merges are shifted too


@pytest.mark.parametrize("cased", [False, True])
def test_wordpiece(cased: bool) -> None:
    base = trained("wordpiece")
    from mtk.tokenizers.library import BertWordPieceCase, BertWordPieceLowerCase

    kind = BertWordPieceCase if cased else BertWordPieceLowerCase
    tokenizer = kind(base.options, base.files)
    assert_same(
        tokenizer,
        "auto",
        [
            *TEXTS,
            "x" * 300,
            "!" * 300,
            "a\x01b c\x7f.d e\x1cf\n\x0bg h\x0ci.j",
            *every_code_point()[::7],
        ],
    )
    assert choose_engine(tokenizer).name == "words"


def sentencepiece_model(**options: Any) -> bytes:
    spm = pytest.importorskip("sentencepiece")
    stream = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=stream,
        vocab_size=options.pop("vocab_size", 340),
        minloglevel=2,
        **options,
    )
    return stream.getvalue()


@pytest.mark.parametrize(
    "options",
    [
        {"byte_fallback": True},
        {"byte_fallback": True, "normalization_rule_name": "identity",
         "remove_extra_whitespaces": False, "user_defined_symbols": ["▁▁", "▁▁▁▁"]},
        {"vocab_size": 60},
        {"normalization_rule_name": "nfkc_cf", "vocab_size": 60},
    ],
    ids=["standard", "as Llama", "without bytes", "folded"],
)  # fmt: skip
def test_sentencepiece_bpe(options: dict[str, Any]) -> None:
    model = sentencepiece_model(model_type="bpe", **options)
    tokenizer = GPTSentencePieceTokenizer({"add_bos": False}, {"tokenizer.model": model})
    assert choose_engine(tokenizer).name == "words"
    assert_same(tokenizer, "words", [*TEXTS, *every_code_point()[::7]])


def test_sentencepiece_that_cannot_be_cut() -> None:
    def engine(options: dict[str, Any], **training: Any) -> str:
        model = {"tokenizer.model": sentencepiece_model(**training)}
        defaults = {"legacy": False, "extra_ids": 0, "special_tokens": []}
        return choose_engine(SentencePieceTokenizer(defaults | options, model)).name

    bpe = {"model_type": "bpe", "vocab_size": 60}
    assert engine({"add_bos": False}, **bpe) == "words"
    assert engine({"add_bos": True}, **bpe) == "reference"
    assert engine({"add_bos": False, "legacy": True}, **bpe) == "reference"
    assert engine({"add_bos": False}, **bpe, add_dummy_prefix=False) == "reference"
    assert engine({"add_bos": False}, **bpe, user_defined_symbols=["a▁b"]) == "reference"
    assert engine({"add_bos": False}, model_type="unigram", vocab_size=39) == "reference"


def test_a_cache_forgets_when_it_is_full() -> None:
    calls: list[list[str]] = []

    def encode(words: Any) -> list[list[int]]:
        calls.append(list(words))
        return [[len(word)] * len(word) for word in words]

    cache = WordCache(encode, limit=4000)
    for number in range(200):
        text = [f"w{number}", "same", "", "é"]
        ids = [len(word).to_bytes(4, "little") * len(word) for word in text]
        assert cache.look_up([text, text]) == [b"".join(ids)] * 2
        assert len(cache) < 40
    assert 10 < sum("same" in call for call in calls) < 60


def test_lone_surrogates_and_nothing() -> None:
    for kind in ("bpe", "wordpiece"):
        engine = choose_engine(trained(kind))
        with pytest.raises(DataError, match="surrogate"):
            engine.encode(["a\ud800"])
        ids, lengths = engine.encode([])
        assert (len(ids), len(lengths)) == (0, 0)


def test_a_very_long_text() -> None:
    long = "".join(mixtures(30)) * 200 + "a" * 300_000
    for kind in ("bpe", "wordpiece"):
        assert_same(trained(kind), "auto", [long, "b"])


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastokens_engine, "is_installed", lambda: False)
    monkeypatch.setattr("mtk.tokenizers.engines.is_installed", lambda: False)
    assert choose_engine(trained("bpe")).name == "reference"
    with pytest.raises(ConfigError, match="pip install"):
        choose_engine(trained("bpe"), "fastokens")


def test_protocol_buffers() -> None:
    message = bytes([0x08, 0x96, 0x01, 0x12, 0x02]) + b"hi" + bytes([0x1D, 0, 0, 0, 1])
    assert list(fields(message)) == [(1, 150), (2, b"hi"), (3, b"\0\0\0\1")]
    for broken in (b"\x08", b"\x08\x96", b"\x0b"):
        with pytest.raises(ValueError, match=r"message|kind"):
            list(fields(broken))
    assert word_cache._is_bpe(b"") is False
