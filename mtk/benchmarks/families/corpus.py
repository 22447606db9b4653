"""The text that every family learns by heart: pages of Python's language reference.

The same stages as in every pipeline make it into tokens: a byte-level BPE over whole documents for
decoders, WordPiece over sentences for BERT and T5.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
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
# Of them, for BERT and T5: they see a seventh of the tokens that a decoder learns from in a step.
SENTENCE_TOPICS = ("booleans",)
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
    text: Path
    sentence_text: Path

    @property
    def sha256(self) -> str:
        """Of the decoders' text."""
        return sha256_file(self.text)

    def prefix(self, kind: str) -> str:
        return str(self.documents if kind == "documents" else self.sentences)

    def fields(self) -> dict[str, Any]:
        """For machines."""
        return {
            "topics": TOPICS,
            "sha256": self.sha256,
            "sentence_topics": SENTENCE_TOPICS,
            "sentence_sha256": sha256_file(self.sentence_text),
        }


def make_corpus(folder: Path, stages: Stages, session: Session) -> Corpus:
    """Write text, tokenizers and datasets into ``folder``. Raises DataError for a Python that
    lacks its documentation, and what the stages raise."""
    text, sentence_text = folder / "text.jsonl", folder / "sentences.jsonl"
    _write(text, TOPICS)
    _write(sentence_text, SENTENCE_TOPICS)
    for kind, source, size in (
        ("bpe", text, BPE_SIZE),
        ("wordpiece", sentence_text, WORDPIECE_SIZE),
    ):
        words = {"input": [str(source)], "type": kind, "vocab_size": size}
        stages.tokenizer(make(TrainTokenizerConfig, **words, output=str(folder / kind)), session)
    documents = {"tokenizer_model": str(folder / "bpe"), "append_eod": True}
    sentences = {
        "tokenizer_type": "BertWordPieceLowerCase",
        "vocab_file": str(next((folder / "wordpiece").rglob("vocab.txt"))),
        "vocab_extra_ids": SENTINELS,
        "split_sentences": True,
    }
    for prefix, source, own in (
        ("decoders", text, documents),
        ("encoders", sentence_text, sentences),
    ):
        given = {**own, "input": [str(source)], "workers": 1}
        stages.preprocess(
            make(PreprocessConfig, **given, output_prefix=str(folder / prefix)), session
        )
    return Corpus(
        folder / "decoders_text_document", folder / "encoders_text_sentence", text, sentence_text
    )


def _write(path: Path, topics: Sequence[str]) -> None:
    found = {
        document.source.removeprefix("pydoc:"): document.text for document in topic_documents()
    }
    missing = [topic for topic in topics if topic not in found]
    if missing:
        raise DataError(f"this Python comes without the topics {', '.join(missing)}.")
    lines = (json.dumps({"text": found[topic]}) + "\n" for topic in topics)
    path.write_text("".join(lines), encoding="utf-8")
