"""The quality gate: perplexity before and after, measured through the written files."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mtk.artifacts import InputRecord, input_file
from mtk.config.quantize import QuantizeConfig
from mtk.data.dataset_artifact import open_dataset
from mtk.errors import DataError, GateError
from mtk.evaluation.documents import read_documents
from mtk.evaluation.perplexity import Advance, Settings, check_ids, token_windows
from mtk.evaluation.scorer import Scorer
from mtk.models.gpt import GPT
from mtk.tokenizers import Tokenizer


@dataclass(frozen=True)
class Gate:
    """Perplexity per token on the same tokens; increase and limit in percent."""

    dialect: str
    tokens: int
    loss_before: float
    loss_after: float
    perplexity_before: float
    perplexity_after: float
    increase: float
    limit: float
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def gate_inputs(config: QuantizeConfig) -> list[InputRecord]:
    """The data of the gate, for the manifest. Raises DataError."""
    if config.calibration_data is not None:
        return [open_dataset(config.calibration_data).input_record("calibration data")]
    return [input_file(path, "calibration data") for path in config.valid_data]


def gate_sequences(
    config: QuantizeConfig, tokenizer: Tokenizer | None, model: GPT
) -> list[list[int]]:
    """Token sequences of at least two, ``gate_tokens`` in all. Raises DataError."""
    if config.calibration_data is not None:
        found = _from_dataset(config.calibration_data, tokenizer)
    else:
        if tokenizer is None:
            raise DataError(
                "the model has no tokenizer; give --calibration-data, which needs none."
            )
        found = _from_files(config.valid_data, config.text_key, tokenizer)
    sequences = list(_limited(found, config.gate_tokens))
    if not sequences:
        raise DataError("the calibration data holds no sequence of two tokens or more.")
    for sequence in sequences:
        check_ids(sequence, model, "calibration data")
    return sequences


def measure(
    model: GPT, sequences: Sequence[Sequence[int]], advance: Advance = lambda count: None
) -> tuple[float, int]:
    """Mean loss in nats, and the number of scored tokens."""
    settings = Settings(model.config.seq_length)
    scores = token_windows(Scorer(model, pad=0), sequences, settings, advance)
    entries = [entry for found in scores for entry in found]
    scored = sum(entry["scored"] for entry in entries)
    return -math.fsum(entry["log_likelihood"] for entry in entries) / scored, scored


def judge(dialect: str, before: float, after: float, tokens: int, limit: float) -> Gate:
    """Compare two losses. The increase is exp(after - before) - 1, in percent."""
    increase = 100 * math.expm1(min(after - before, 700.0))
    return Gate(
        dialect=dialect,
        tokens=tokens,
        loss_before=before,
        loss_after=after,
        perplexity_before=math.exp(min(before, 700.0)),
        perplexity_after=math.exp(min(after, 700.0)),
        increase=increase,
        limit=limit,
        # Written so that NaN fails.
        passed=increase <= limit,
    )


def require(gate: Gate) -> None:
    """Raises GateError unless the gate passed."""
    if not gate.passed:
        raise GateError(
            f"the quantised model ({gate.dialect}) has perplexity {gate.perplexity_after:.5g} "
            f"where the original has {gate.perplexity_before:.5g}: {gate.increase:+.3f} %, allowed "
            f"{gate.limit:+.3f} % on {gate.tokens} tokens. Nothing was published. Raise "
            f"--max-perplexity-increase if that is acceptable."
        )


def _from_files(paths: Sequence[str], key: str, tokenizer: Tokenizer) -> Iterator[list[int]]:
    for path in paths:
        for document in read_documents(Path(path), key):
            yield tokenizer.encode(document.text)


def _from_dataset(prefix: str, tokenizer: Tokenizer | None) -> Iterator[list[int]]:
    info = open_dataset(prefix)
    known = (info.tokenizer_fingerprint, tokenizer.fingerprint if tokenizer else None)
    if None not in known and known[0] != known[1]:
        raise DataError(
            f"{prefix} was made with another tokenizer than the model's (fingerprints "
            f"{str(known[0])[:16]}... and {str(known[1])[:16]}...)."
        )
    dataset = info.open()
    for index in range(len(dataset)):
        yield [int(token) for token in dataset[index]]


def _limited(sequences: Iterable[list[int]], limit: int) -> Iterator[list[int]]:
    left = limit
    for sequence in sequences:
        cut = list(itertools.islice(sequence, left))
        if len(cut) >= 2:
            yield cut
            left -= len(cut)
        if left < 2:
            return
