"""The text that every family learns by heart: pages of Python's language reference.

The same stages as in every pipeline make it into tokens: a byte-level BPE over whole documents for
decoders, WordPiece over sentences for BERT and T5.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtk.artifacts import Artifact
from mtk.artifacts.hashing import sha256_file
from mtk.config import make
from mtk.config.preprocess import PreprocessConfig
from mtk.config.tokenizer import TrainTokenizerConfig
from mtk.data.demo_corpus import topic_documents
from mtk.errors import DataError
from mtk.session import Session

# Prose of some hundred words each; none is long, few name what others do not.
TOPICS = ("booleans", "power", "shifting")
BPE_SIZE = 384
WORDPIECE_SIZE = 400
SENTINELS = 20
Stage = Callable[[Any, Session], Artifact]


@dataclass(frozen=True)
class Stages:
    """The functions of the stages, which lie above this layer."""

    tokenizer: Stage
    preprocess: Stage
    pretrain: Stage


@dataclass(frozen=True)
class Corpus:
    """documents, sentences: prefixes of datasets of the same text."""

    documents: Path
    sentences: Path
    text_bytes: int
    sha256: str

    def prefix(self, kind: str) -> str:
        return str(self.documents if kind == "documents" else self.sentences)

    def fields(self) -> dict[str, Any]:
        """For machines."""
        return {"topics": TOPICS, "text_bytes": self.text_bytes, "sha256": self.sha256}


def make_corpus(folder: Path, stages: Stages, session: Session) -> Corpus:
    """Write text, tokenizers and datasets into ``folder``. Raises DataError for a Python that
    lacks its documentation, and what the stages raise."""
    text = folder / "text.jsonl"
    size = _write(text)
    for kind, size_of in (("bpe", BPE_SIZE), ("wordpiece", WORDPIECE_SIZE)):
        words = {"input": [str(text)], "type": kind, "vocab_size": size_of}
        config = make(TrainTokenizerConfig, **words, output=str(folder / kind))
        stages.tokenizer(config, session)
    common = {"input": [str(text)], "workers": 1}
    documents = {"tokenizer_model": str(folder / "bpe"), "append_eod": True}
    sentences = {
        "tokenizer_type": "BertWordPieceLowerCase",
        "vocab_file": str(next((folder / "wordpiece").rglob("vocab.txt"))),
        "vocab_extra_ids": SENTINELS,
        "split_sentences": True,
    }
    for prefix, own in (("decoders", documents), ("encoders", sentences)):
        config = make(PreprocessConfig, **common, **own, output_prefix=str(folder / prefix))
        stages.preprocess(config, session)
    return Corpus(
        folder / "decoders_text_document",
        folder / "encoders_text_sentence",
        size,
        sha256_file(text),
    )


def _write(path: Path) -> int:
    """Bytes of text."""
    found = {
        document.source.removeprefix("pydoc:"): document.text for document in topic_documents()
    }
    missing = [topic for topic in TOPICS if topic not in found]
    if missing:
        raise DataError(f"this Python comes without the topics {', '.join(missing)}.")
    texts = [found[topic] for topic in TOPICS]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return sum(len(text.encode()) for text in texts)
