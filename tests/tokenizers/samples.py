"""Small tokenizer files and texts for the tests, and where real files may be found."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import pytest

from mtk.config import make
from mtk.config.tokenizer import TokenizerConfig, TrainTokenizerConfig
from mtk.tokenizers import Tokenizer
from mtk.tokenizers.byte_level import byte_of_character
from mtk.tokenizers.training import train_tokenizer

SENTENCE = "the model reads a token and the loss of the model falls as the model is trained"
WORDS = SENTENCE.split()
CORPUS = [" ".join(WORDS[i:] + WORDS[:i]) + ". 123 naïve — façade\n" for i in range(len(WORDS))]

TRICKY = [
    "",
    " ",
    "Hello world",
    "  two  spaces\n\nand\tlines \n",
    "naïve façade — “quoted” 日本語 🎉👩‍👩‍👧",
    "a\x00b\x7f\u200b\ufeffc",
    "<|endoftext|> [MASK] </s> <s> <unk>",
    "x" * 3000,
    "İstanbul ǅ ﬁ \u0301",
    "don't we'll I'M 1234567 3.14",
]


def asset(name: str) -> Path:
    """A real file below MTK_TEST_ASSETS, e.g. "gpt2/vocab.json"; skips without it."""
    root = os.environ.get("MTK_TEST_ASSETS")
    if not root or not (Path(root) / name).exists():
        pytest.skip(f"MTK_TEST_ASSETS does not hold {name}")
    return Path(root) / name


def trained(kind: str, vocab_size: int = 400) -> Tokenizer:
    config = make(TrainTokenizerConfig, input=("-",), output="-", type=kind, vocab_size=vocab_size)
    return train_tokenizer(config, lambda: iter(CORPUS))


def options(**values: object) -> TokenizerConfig:
    return make(TokenizerConfig, **values)


def gpt2_files(folder: Path) -> TokenizerConfig:
    """A byte-level vocabulary with six merges, in GPT-2's files."""
    merges = ["t h", "th e", "Ġ the", "o d", "od e", "Ġ m"]
    pieces = [*sorted(byte_of_character()), *(merge.replace(" ", "") for merge in merges)]
    pieces.append("<|endoftext|>")
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    (folder / "v.json").write_text(json.dumps(vocabulary))
    (folder / "m.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return options(
        tokenizer_type="GPT2BPETokenizer",
        vocab_file=str(folder / "v.json"),
        merge_file=str(folder / "m.txt"),
    )


def bert_files(
    folder: Path, kind: str = "BertWordPieceLowerCase", **more: object
) -> TokenizerConfig:
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"abcdehlorw.[]",
        "hello",
        "##lo",
        "wor",
    ]
    pieces += ["##ld", "Hello", "naive"]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    return options(tokenizer_type=kind, vocab_file=str(folder / "vocab.txt"), **more)


def tiktoken_json(folder: Path, **more: object) -> TokenizerConfig:
    pieces = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" the", b" m"]
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": ""}
        for rank, piece in enumerate(pieces)
    ]
    (folder / "tik.json").write_text(json.dumps(entries))
    return options(tokenizer_type="TikTokenizer", tokenizer_model=str(folder / "tik.json"), **more)


def tiktoken_plain(folder: Path, **more: object) -> TokenizerConfig:
    pieces = [bytes([byte]) for byte in range(256)] + [b"th", b"the"]
    lines = [f"{base64.b64encode(p).decode()} {rank}\n" for rank, p in enumerate(pieces)]
    (folder / "x.tiktoken").write_text("".join(lines))
    model = str(folder / "x.tiktoken")
    return options(tokenizer_type="TikTokenizer", tokenizer_model=model, **more)
