"""Each type: ids, round trips, exact bytes, special tokens as plain text, saving and loading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mtk.errors import ConfigError, DataError
from mtk.tokenizers import Tokenizer, build_tokenizer, load_tokenizer
from mtk.tokenizers.base import DESCRIPTION
from tests.tokenizers.samples import (
    TRICKY,
    bert_files,
    gpt2_files,
    options,
    tiktoken_json,
    tiktoken_plain,
    trained,
)

Maker = Callable[[Path], Tokenizer]
BYTE_LEVEL: dict[str, Maker] = {
    "gpt2": lambda folder: build_tokenizer(gpt2_files(folder)),
    "bpe": lambda folder: trained("bpe"),
    "unigram": lambda folder: trained("unigram"),
    "tiktoken json": lambda folder: build_tokenizer(
        tiktoken_json(folder, tiktoken_num_special_tokens=10)
    ),
    "tiktoken": lambda folder: build_tokenizer(tiktoken_plain(folder, tiktoken_pattern="cl100k")),
}
ALL: dict[str, Maker] = {
    **BYTE_LEVEL,
    "wordpiece": lambda folder: trained("wordpiece"),
    "bert": lambda folder: build_tokenizer(bert_files(folder, vocab_extra_ids=2)),
    "bert sep": lambda folder: build_tokenizer(
        bert_files(folder, "BertWordPieceCase", bert_eod="sep")
    ),
    "null": lambda folder: build_tokenizer(options(tokenizer_type="NullTokenizer", vocab_size=9)),
}


@pytest.mark.parametrize("name", BYTE_LEVEL)
@pytest.mark.parametrize("text", TRICKY, ids=range(len(TRICKY)))
def test_byte_level_is_lossless(name: str, text: str, tmp_path: Path) -> None:
    tokenizer = BYTE_LEVEL[name](tmp_path)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    parts = [tokenizer.token_bytes(token) for token in ids]
    assert b"".join(part or b"" for part in parts) == text.encode()
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert tokenizer.eod not in ids
    assert tokenizer.token_bytes(tokenizer.eod) == b""
    assert tokenizer.exact_bytes


@pytest.mark.parametrize("name", ALL)
def test_saved_and_loaded_is_the_same(name: str, tmp_path: Path) -> None:
    tokenizer = ALL[name](tmp_path)
    tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    again = build_tokenizer(options(tokenizer_model=str(tmp_path / "saved")))
    texts = ["1 2 8"] if name == "null" else TRICKY
    for other in (loaded, again):
        assert other.fingerprint == tokenizer.fingerprint
        assert (other.kind, other.vocab_size, other.eod) == (
            tokenizer.kind,
            tokenizer.vocab_size,
            tokenizer.eod,
        )
        assert other.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
        for role in ("bos", "eos", "pad", "cls", "sep", "mask", "extra_ids"):
            assert getattr(other, role) == getattr(tokenizer, role)
    loaded.save(tmp_path / "twice")
    for path in (tmp_path / "saved").iterdir():
        assert (tmp_path / "twice" / path.name).read_bytes() == path.read_bytes()


def test_fingerprints_tell_tokenizers_apart(tmp_path: Path) -> None:
    found = {ALL[name](tmp_path).fingerprint for name in ALL}
    more = [
        build_tokenizer(bert_files(tmp_path)),
        build_tokenizer(bert_files(tmp_path, bert_eod="sep")),
        build_tokenizer(options(tokenizer_type="NullTokenizer", vocab_size=10)),
        trained("bpe", 300),
    ]
    assert len(found | {t.fingerprint for t in more}) == len(ALL) + len(more)


def test_a_fingerprint_does_not_depend_on_file_names(tmp_path: Path) -> None:
    first = build_tokenizer(gpt2_files(tmp_path))
    first.save(tmp_path / "saved")
    again = options(tokenizer_type="GPT2BPETokenizer", tokenizer_model=str(tmp_path / "saved"))
    assert build_tokenizer(again).fingerprint == first.fingerprint


def test_gpt2_ids(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(gpt2_files(tmp_path))
    pieces = [tokenizer.piece(token) for token in tokenizer.encode("the model\n")]
    assert pieces == ["the", "Ġm", "ode", "l", "Ċ"]
    assert (tokenizer.vocab_size, tokenizer.eod) == (263, 262)
    assert tokenizer.decode([tokenizer.eod]) == "<|endoftext|>"


def test_bert_variants(tmp_path: Path) -> None:
    legacy = build_tokenizer(bert_files(tmp_path, vocab_extra_ids=2))
    assert [legacy.piece(t) for t in legacy.encode("Hello WORLD.")] == [
        "hello",
        "wor",
        "##ld",
        ".",
    ]
    size = legacy.vocab_size - 4
    assert [legacy.piece(size + i) for i in range(4)] == [
        "[BOS]",
        "[EOS]",
        "<extra_id_0>",
        "<extra_id_1>",
    ]
    assert (legacy.eod, legacy.eos, legacy.bos) == (size + 1, size + 1, size)
    assert legacy.extra_ids == (size + 2, size + 3)
    assert (legacy.pad, legacy.cls, legacy.sep, legacy.mask) == (0, 2, 3, 4)
    assert legacy.mask not in legacy.encode("[MASK]")

    later = build_tokenizer(bert_files(tmp_path, "BertWordPieceCase", bert_eod="sep"))
    assert (later.vocab_size, later.eod, later.eos) == (size, 3, None)
    assert [later.piece(t) for t in later.encode("Hello naïve")] == ["Hello", "[UNK]"]
    assert [legacy.piece(t) for t in legacy.encode("naïve")] == ["naive"]


def test_tiktoken_layouts(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tiktoken_json(tmp_path))
    assert tokenizer.vocab_size == 1000 + 260
    assert [tokenizer.piece(i) for i in (0, 1, 2, 7, 999)] == [
        "<unk>",
        "<s>",
        "</s>",
        "<SPECIAL_7>",
        "<SPECIAL_999>",
    ]
    assert tokenizer.eod == 2
    assert tokenizer.encode("the the") == [1257, 1258]
    cut = build_tokenizer(tiktoken_json(tmp_path, vocab_size=1258))
    assert [cut.piece(t) for t in cut.encode("the the")] == ["the", " ", "the"]
    plain = build_tokenizer(tiktoken_plain(tmp_path, tiktoken_pattern="gpt2"))
    assert (plain.vocab_size, plain.eod) == (259, 258)
    assert plain.encode("the") == [257]


def test_null_variants() -> None:
    legacy = build_tokenizer(options(tokenizer_type="NullTokenizer", vocab_size=9))
    assert (legacy.vocab_size, legacy.eod) == (10, 9)
    assert legacy.decode(legacy.encode(" 1 2\n8 ")) == "1 2 8"
    later = build_tokenizer(
        options(tokenizer_type="NullTokenizer", vocab_size=9, null_tokenizer_eod_id=8)
    )
    assert (later.vocab_size, later.eod) == (9, 8)
    for text in ("1 x", "10", "-1"):
        with pytest.raises(DataError):
            legacy.encode(text)


@pytest.mark.parametrize("name", [name for name in ALL if name != "null"])
def test_lone_surrogates_are_refused(name: str, tmp_path: Path) -> None:
    tokenizer = ALL[name](tmp_path)
    with pytest.raises(DataError, match="surrogate"):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "v.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "v.json").write_text("[1]"), "must map"),
        (lambda f: (f / "m.txt").write_text("#version\nt h e\n"), "line 2"),
        (lambda f: (f / "m.txt").write_text("q qq\n"), "not in vocab.json"),
        (lambda f: (f / "m.txt").write_bytes(b"\xff"), "UTF-8"),
        (lambda f: (f / "m.txt").unlink(), "cannot be read"),
    ],
)
def test_bad_gpt2_files(change: Callable[[Path], object], words: str, tmp_path: Path) -> None:
    config = gpt2_files(tmp_path)
    change(tmp_path)
    with pytest.raises(DataError, match=words):
        build_tokenizer(config)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        ("AA== 0\nxx", "line 2"),
        ("AA== 0", "lacks 255"),
        ("[1]", "entry 0"),
        ('[{"rank": 1, "token_bytes": "AA=="}]', "rank 1"),
    ],
)
def test_bad_tiktoken_files(content: str, words: str, tmp_path: Path) -> None:
    config = tiktoken_plain(tmp_path)
    (tmp_path / "x.tiktoken").write_text(content)
    with pytest.raises(DataError, match=words):
        build_tokenizer(config)


def test_a_tiktoken_file_of_unknown_size_needs_its_pattern(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--tiktoken-pattern"):
        build_tokenizer(tiktoken_plain(tmp_path))
    with pytest.raises(DataError, match="must lie between"):
        build_tokenizer(tiktoken_json(tmp_path, vocab_size=2000))
    with pytest.raises(DataError, match="special tokens"):
        build_tokenizer(tiktoken_json(tmp_path, tokenizer_special_tokens=("<unk>",)))


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt", "tokenizer.json"])
def test_a_changed_file_is_refused(file: str, tmp_path: Path) -> None:
    build_tokenizer(gpt2_files(tmp_path)).save(tmp_path / "saved")
    path = tmp_path / "saved" / file
    path.write_text(path.read_text() + " ")
    with pytest.raises(DataError, match=f"{file} changed"):
        load_tokenizer(tmp_path / "saved")


def test_edited_options_are_refused(tmp_path: Path) -> None:
    build_tokenizer(bert_files(tmp_path)).save(tmp_path / "saved")
    path = tmp_path / "saved" / DESCRIPTION
    description = json.loads(path.read_text())
    description["options"]["bert_eod"] = "sep"
    path.write_text(json.dumps(description))
    with pytest.raises(DataError, match="fingerprint"):
        load_tokenizer(tmp_path / "saved")
    description["files"] = ["../vocab.txt"]
    path.write_text(json.dumps(description))
    with pytest.raises(DataError, match="not in the folder"):
        load_tokenizer(tmp_path / "saved")


def test_a_saved_tokenizer_takes_no_other_type_or_options(tmp_path: Path) -> None:
    build_tokenizer(gpt2_files(tmp_path)).save(tmp_path / "saved")
    model = str(tmp_path / "saved")
    with pytest.raises(DataError, match="holds a GPT2BPETokenizer"):
        build_tokenizer(options(tokenizer_model=model, tokenizer_type="HuggingFaceTokenizer"))
    with pytest.raises(ConfigError, match="eod_token"):
        build_tokenizer(options(tokenizer_model=model, eod_token="x"))
    with pytest.raises(ConfigError, match="tokenizer_type"):
        build_tokenizer(options(tokenizer_model=str(tmp_path / "v.json")))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, ["tokenizer_type", "no tokenizer chosen"]),
        ({"tokenizer_type": "GPT2BPETokenizer"}, ["vocab_file", "merge_file"]),
        ({"tokenizer_type": "NullTokenizer"}, ["vocab_size"]),
        ({"tokenizer_type": "NullTokenizer", "vocab_size": 0}, ["Nearest: 1"]),
        ({"tokenizer_type": "gpt2"}, ["must be one of"]),
        (
            {"tokenizer_type": "NullTokenizer", "vocab_size": 5, "merge_file": "x"},
            ["merge_file", "no meaning"],
        ),
        (
            {"tokenizer_type": "NullTokenizer", "vocab_size": 5, "null_tokenizer_eod_id": 5},
            ["Nearest: 4"],
        ),
    ],
)
def test_option_rules(values: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        options(**values)
    assert [word for word in words if word not in str(caught.value)] == []
