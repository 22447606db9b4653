"""The ways that others go, each as plainly as they do.

Tokenizers are ready before the clock starts; what is timed reads, encodes and writes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtk.data.indexed_dataset import IndexedDatasetWriter, token_dtype
from mtk.errors import ConfigError
from mtk.tokenizers import Tokenizer, load_tokenizer
from mtk.tokenizers.engines import choose_engine
from mtk.tokenizers.flat import REFERENCE
from mtk.tokenizers.punkt import PunktSplitter

BATCH = 100  # texts
POOL_CHUNK = 32  # documents, as Megatron's pool hands them out

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Work:
    """file: .jsonl. tokenizer: the folder of a saved one. folder: to write to. punkt: file of
    its parameters, for the ways that split."""

    file: str
    key: str
    tokenizer: str
    folder: str
    punkt: str = ""
    workers: int = 1


@dataclass(frozen=True)
class Found:
    """detail: what did the work."""

    seconds: float
    tokens: int
    detail: str = ""


def texts_of(work: Work) -> list[str]:
    with Path(work.file).open(encoding="utf-8") as stream:
        return [json.loads(line)[work.key] for line in stream]


def engine_alone(work: Work) -> Found:
    return _batches(work, "auto")


def plain_loop(work: Work) -> Found:
    """``encode_batch`` of a hundred texts at a time, to lists."""
    return _batches(work, REFERENCE)


def _batches(work: Work, engine: str) -> Found:
    texts, encoder = texts_of(work), choose_engine(load_tokenizer(work.tokenizer), engine)
    started = time.perf_counter()
    tokens = sum(len(encoder.encode(texts[i : i + BATCH])[0]) for i in range(0, len(texts), BATCH))
    return Found(time.perf_counter() - started, tokens, encoder.name)


def megatron(work: Work) -> Found:
    """A line at a time: parse, call the tokenizer, keep a list; a pool of one process hands the
    documents back in order, and each is written by itself. With ``punkt``, sentences are cut
    in a pass of their own before, to another .jsonl."""
    tokenizer = load_tokenizer(work.tokenizer)
    _, detail = tokenizer_call(tokenizer, work.tokenizer)
    started = time.perf_counter()
    source = Path(work.file)
    if work.punkt:
        source = Path(work.folder, "sentences.jsonl")
        _split_file(work, source)
    tokens = 0
    prefix = Path(work.folder, "megatron")
    with (
        multiprocessing.get_context("fork").Pool(1, _Document.prepare, (work,)) as pool,
        source.open(encoding="utf-8") as stream,
        IndexedDatasetWriter(prefix, token_dtype(tokenizer.vocab_size)) as writer,
    ):
        for ids, lengths in pool.imap(_Document.encode, stream, POOL_CHUNK):
            writer.add_document(np.array(ids, dtype=writer.dtype), lengths)
            tokens += len(ids)
    return Found(time.perf_counter() - started, tokens, detail)


class _Document:
    """What the pool's process holds; Megatron's keeps it on a class as well."""

    call: Encode
    work: Work
    eod: int
    splitter: PunktSplitter

    @classmethod
    def prepare(cls, work: Work) -> None:
        tokenizer = load_tokenizer(work.tokenizer)
        cls.call, cls.work = tokenizer_call(tokenizer, work.tokenizer)[0], work
        cls.eod = tokenizer.eod
        cls.splitter = PunktSplitter(work.punkt, False)

    @classmethod
    def encode(cls, line: str) -> tuple[list[int], list[int]]:
        value = json.loads(line)[cls.work.key]
        ids: list[int] = []
        lengths: list[int] = []
        for sentence in value if isinstance(value, list) else [value]:
            found = cls.call(sentence)
            if found:
                ids.extend(found)
                lengths.append(len(found))
        if ids:
            ids.append(cls.eod)
            lengths[-1] += 1
        return ids, lengths

    @classmethod
    def split(cls, line: str) -> str:
        record = json.loads(line)
        punkt = cls.splitter.plain.tokenize
        return json.dumps({cls.work.key: punkt(record[cls.work.key])})


def _split_file(work: Work, target: Path) -> None:
    with (
        multiprocessing.get_context("fork").Pool(1, _Document.prepare, (work,)) as pool,
        Path(work.file).open(encoding="utf-8") as stream,
        target.open("w", encoding="utf-8") as out,
    ):
        for line in pool.imap(_Document.split, stream, POOL_CHUNK):
            out.write(line + "\n")


def tokenizer_call(tokenizer: Tokenizer, folder: str) -> tuple[Encode, str]:
    """How Megatron's releases since core 0.15 call it: through transformers, or SentencePiece."""
    if hasattr(tokenizer, "processor"):
        return tokenizer.encode, "sentencepiece"
    try:
        from transformers import AutoTokenizer

        made = AutoTokenizer.from_pretrained(folder)
    except (ImportError, OSError, ValueError):
        return tokenizer.encode, type(tokenizer).__name__
    return (lambda text: made(text, add_special_tokens=False).input_ids), "transformers"


def datatrove(work: Work) -> Found:
    """Reader and tokenizer of datatrove in this process. Raises ConfigError without it."""
    try:
        from datatrove.executor import LocalPipelineExecutor
        from datatrove.pipeline.readers import JsonlReader
        from datatrove.pipeline.tokens import DocumentTokenizer
    except ImportError as error:
        raise ConfigError("datatrove is not installed") from error
    tokenizer = load_tokenizer(work.tokenizer)
    description = Path(work.tokenizer, "tokenizer.json")
    if not description.is_file():
        raise ConfigError("datatrove needs a tokenizer.json")
    steps = [
        JsonlReader(str(Path(work.file).parent), glob_pattern=Path(work.file).name,
                    text_key=work.key),
        DocumentTokenizer(
            output_folder=work.folder,
            tokenizer_name_or_path=str(description.resolve()),
            eos_token=tokenizer.piece(tokenizer.eod),
            shuffle_documents=False,
        ),
    ]  # fmt: skip
    started = time.perf_counter()
    LocalPipelineExecutor(steps, logging_dir=f"{work.folder}/log").run()
    seconds = time.perf_counter() - started
    return Found(seconds, sum(_tokens(Path(work.folder), tokenizer)), "tokenizers")


def _tokens(folder: Path, tokenizer: Tokenizer) -> Iterator[int]:
    item = 2 if tokenizer.vocab_size < 1 << 16 else 4
    return (os.path.getsize(path) // item for path in folder.glob("*.ds"))  # noqa: PTH202


PLAIN: dict[str, Callable[[Work], Any]] = {
    "engine": engine_alone,
    "loop": plain_loop,
    "datatrove": datatrove,
    "megatron": megatron,
    "megatron-split": megatron,
}
