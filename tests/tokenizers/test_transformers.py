"""Saved folders load in transformers, offline and silently, with the same ids."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mtk.tokenizers import Tokenizer, build_tokenizer, load_tokenizer
from tests.tokenizers.samples import TRICKY, asset, bert_files, gpt2_files, options, trained

pytestmark = pytest.mark.slow
pytest.importorskip("transformers")

PROGRAM = """
import json, sys, warnings
warnings.simplefilter("error")
from transformers import AutoTokenizer
folder, texts = sys.argv[1], json.loads(sys.stdin.read())
tokenizer = AutoTokenizer.from_pretrained(folder)
print(json.dumps({
    "ids": [tokenizer(text).input_ids for text in texts],
    "decoded": [tokenizer.decode(tokenizer(text).input_ids) for text in texts],
    "size": len(tokenizer),
    "eos": tokenizer.eos_token_id,
    "sep": tokenizer.sep_token_id,
}))
"""


def in_transformers(folder: Path, texts: list[str]) -> dict[str, object]:
    """What transformers makes of the folder in a process without network and with warnings
    as errors; it must not write a word to stderr."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        env={"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HOME": str(folder)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found: dict[str, object] = json.loads(done.stdout)
    return found


def same(tokenizer: Tokenizer, folder: Path, texts: list[str] = TRICKY) -> None:
    tokenizer.save(folder)
    found = in_transformers(folder, texts)
    assert found["ids"] == [tokenizer.encode(text) for text in texts]
    assert found["size"] == tokenizer.vocab_size
    assert tokenizer.eod in (found["eos"], found["sep"])
    if tokenizer.exact_bytes:
        assert found["decoded"] == texts


MAKERS: dict[str, Callable[[Path], Tokenizer]] = {
    "bpe": lambda folder: trained("bpe"),
    "unigram": lambda folder: trained("unigram"),
    "wordpiece": lambda folder: trained("wordpiece"),
    "gpt2": lambda folder: build_tokenizer(gpt2_files(folder)),
    "bert": lambda folder: build_tokenizer(bert_files(folder, vocab_extra_ids=3)),
    "bert sep": lambda folder: build_tokenizer(bert_files(folder, bert_eod="sep")),
}


@pytest.mark.parametrize("name", MAKERS)
def test_same_ids(name: str, tmp_path: Path) -> None:
    same(MAKERS[name](tmp_path), tmp_path / "saved")


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_beside_a_model_config(model_type: str, tmp_path: Path) -> None:
    """As in an exported model's folder."""
    tokenizer = trained("bpe")
    tokenizer.save(tmp_path)
    ends = {"bos_token_id": tokenizer.eod, "eos_token_id": tokenizer.eod}
    config = {"model_type": model_type, "vocab_size": tokenizer.vocab_size, **ends}
    (tmp_path / "config.json").write_text(json.dumps(config))
    same(tokenizer, tmp_path)


def test_real_gpt2(tmp_path: Path) -> None:
    files = {
        "vocab_file": str(asset("gpt2/vocab.json")),
        "merge_file": str(asset("gpt2/merges.txt")),
    }
    tokenizer = build_tokenizer(options(tokenizer_type="GPT2BPETokenizer", **files))
    assert (tokenizer.vocab_size, tokenizer.eod) == (50257, 50256)
    assert tokenizer.encode("Hello world") == [15496, 995]
    same(tokenizer, tmp_path)


def test_real_bert_folder_against_vocab_txt(tmp_path: Path) -> None:
    """tokenizer.json as published, and vocab.txt by mtk: the same ids."""
    folder = asset("bert")
    published = load_tokenizer(folder)
    ours = build_tokenizer(
        options(
            tokenizer_type="BertWordPieceLowerCase",
            vocab_file=str(folder / "vocab.txt"),
            bert_eod="sep",
        )
    )
    texts = [text for text in TRICKY if "[MASK]" not in text]
    assert published.encode_batch(texts) == ours.encode_batch(texts)
    assert (published.vocab_size, published.eod) == (ours.vocab_size, ours.eod) == (30522, 102)
    same(ours, tmp_path, texts)
