"""Plain Hugging Face folders: which token ends documents, templates, byte fallback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, processors

from mtk.errors import DataError
from mtk.tokenizers import build_tokenizer, load_tokenizer
from mtk.tokenizers.streaming import StreamingDecoder, stream_text
from tests.tokenizers.samples import options

TEXT = "a é🎉 b"


def byte_fallback_library() -> Library:
    """As Llama's tokenizer.json: spaces as ▁, unknown characters as bytes, BOS by template."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    library = Library(
        models.BPE(
            vocab=vocabulary, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    library.normalizer = normalizers.Replace(" ", "▁")
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    library.enable_truncation(2)
    library.enable_padding(length=50)
    return library


def folder_with(path: Path, **files: Any) -> Path:
    byte_fallback_library().save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def test_templates_truncation_and_padding_are_off(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_with(tmp_path))
    ids = tokenizer.encode(TEXT)
    assert len(ids) == 1 + 1 + 2 + 4 + 1 + 1
    assert tokenizer.decode(ids) == TEXT
    with_bos = build_tokenizer(
        options(
            tokenizer_type="HuggingFaceTokenizer",
            tokenizer_model=str(tmp_path),
            tokenizer_hf_include_special_tokens=True,
        )
    )
    assert with_bos.encode(TEXT) == [1, *ids]
    assert with_bos.fingerprint != tokenizer.fingerprint


def test_streaming_with_byte_fallback(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_with(tmp_path))
    assert not tokenizer.exact_bytes
    decoder = StreamingDecoder(tokenizer)
    arrived = [decoder.feed(token) for token in tokenizer.encode(TEXT)]
    assert arrived == ["a", " ", "", "é", "", "", "", "🎉", " ", "b"]
    unfinished = tokenizer.encode("a🎉")[:-1]
    assert "".join(stream_text(tokenizer, unfinished)) == tokenizer.decode(unfinished)


def test_special_tokens_in_text_follow_the_folder(tmp_path: Path) -> None:
    assert 2 in load_tokenizer(folder_with(tmp_path)).encode("a</s>b")
    folder_with(tmp_path, tokenizer_config={"split_special_tokens": True})
    assert 2 not in load_tokenizer(tmp_path).encode("a</s>b")


@pytest.mark.parametrize(
    ("files", "eod"),
    [
        ({}, "</s>"),
        ({"tokenizer_config": {"eos_token": "b"}}, "b"),
        ({"tokenizer_config": {"eos_token": {"content": "b", "lstrip": False}}}, "b"),
        ({"special_tokens_map": {"eos_token": "a"}}, "a"),
        ({"special_tokens_map": {"eos_token": "a"}, "tokenizer_config": {"eos_token": "b"}}, "b"),
        ({"special_tokens_map": {"sep_token": "a"}}, "a"),
        ({"tokenizer_config": {"eos_token": None}}, "</s>"),
        ({"tokenizer_config": {"eos_token": "absent"}}, "</s>"),
    ],
)
def test_end_of_document(files: dict[str, Any], eod: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_with(tmp_path, **files))
    assert tokenizer.piece(tokenizer.eod) == eod


def test_end_of_document_by_option(tmp_path: Path) -> None:
    model = {"tokenizer_model": str(folder_with(tmp_path))}
    kind = {"tokenizer_type": "HuggingFaceTokenizer"}
    tokenizer = build_tokenizer(options(**model, **kind, eod_token="<s>"))
    assert tokenizer.eod == 1
    with pytest.raises(DataError, match="not in the vocabulary"):
        build_tokenizer(options(**model, **kind, eod_token="nothing"))


def test_files_travel_along(tmp_path: Path) -> None:
    config = {"eos_token": "</s>", "model_max_length": 7}
    tokenizer = load_tokenizer(folder_with(tmp_path, tokenizer_config=config))
    tokenizer.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/tokenizer_config.json").read_text()) == config
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("tokenizer.json", "{", "cannot be read"),
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer_config.json", "[]", "must hold an object"),
        ("mtk_tokenizer.json", "{}", "damaged"),
        ("mtk_tokenizer.json", '{"format": 99}', "newer mtk"),
    ],
)
def test_bad_folders(name: str, content: str | None, words: str, tmp_path: Path) -> None:
    folder_with(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=words):
        load_tokenizer(tmp_path)


def test_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a folder"):
        load_tokenizer(tmp_path / "none")
    kind = "HuggingFaceTokenizer"
    with pytest.raises(DataError, match="names are not looked up"):
        build_tokenizer(options(tokenizer_type=kind, tokenizer_model="gpt2"))
