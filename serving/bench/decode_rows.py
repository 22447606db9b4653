"""Rows, table and file of ``mtk bench decode``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from mtk.benchmarks.record import known_gpu, surroundings
from mtk.config import config_digest, to_dict
from mtk.config.bench_decode import DecodeBenchConfig
from mtk.config.plan import GPUS
from mtk.convert.open_model import OpenedModel
from serving.bench.decode_costs import PEAK_BANDWIDTH, cache_bytes, prefill_flops, weight_bytes

COLUMNS = (
    "",
    "batch",
    "prompt",
    "cache",
    "prefill\ntokens/s",
    "prefill\nMFU",
    "decode\ntokens/s",
    "ms a step",
    "tokens\na step",
    "bandwidth",
    "ratio",
    "same tokens",
)


class Timed(Protocol):
    """One run. prefill_seconds: until all rows have a token; step_seconds: of each step after
    that, which brought ``step_tokens`` in all rows; tokens: what came out, row by row."""

    @property
    def prefill_seconds(self) -> float: ...
    @property
    def step_seconds(self) -> Sequence[float]: ...
    @property
    def step_tokens(self) -> float: ...
    @property
    def cache(self) -> str: ...
    @property
    def tokens(self) -> Sequence[Sequence[int]]: ...


@dataclass(frozen=True)
class Row:
    """One measurement. bandwidth: bytes a second of weights, keys and values that its decode steps
    read. ratio: of its decoding to what it is measured beside: of mtk to transformers, with guesses
    to mtk without. same: share of tokens that both generated. step_tokens: of one sequence.
    cache: what kept the sequences (paged, dense; static of transformers). how: what transformers
    ran, in words."""

    name: str
    batch: int
    prompt_tokens: int
    prefill_seconds: float
    step_seconds: float
    step_tokens: float
    prefill_rate: float
    decode_rate: float
    prefill_flops: float
    bandwidth: float
    mfu: float | None
    ratio: float | None
    same: float | None
    cache: str
    how: str
    runs: Sequence[Timed]


@dataclass
class Report:
    """copy_rate: bytes a second. weight_bytes: of a decode step of one row. skipped: why
    transformers was not measured."""

    config: DecodeBenchConfig
    model: OpenedModel
    hardware: Sequence[dict[str, Any]]
    device: torch.device
    copy_rate: float
    weight_bytes: int
    skipped: str
    rows: list[Row]


def row_of(
    report: Report,
    name: str,
    batch: int,
    prompt_tokens: int,
    runs: Sequence[Timed],
    how: str = "",
    beside: Row | None = None,
) -> Row:
    """The medians of ``runs``. beside: what they are compared with."""
    config, model = report.config, report.model.model
    prefill = statistics.median(run.prefill_seconds for run in runs)
    step = statistics.median(statistics.fmean(run.step_seconds) for run in runs)
    tokens = statistics.median(run.step_tokens for run in runs)
    flops = prefill_flops(report.model.config, batch, prompt_tokens)
    seen = prompt_tokens + config.new_tokens / 2
    moved = weight_bytes(model, batch) + cache_bytes(model, batch, seen)
    known = known_gpu(report.hardware[0]["name"]) if report.hardware else None
    peak = known.peak if known and config.dtype != "fp32" else None
    return Row(
        name,
        batch,
        prompt_tokens,
        prefill,
        step,
        tokens / batch,
        batch * prompt_tokens / prefill,
        tokens / step,
        flops,
        moved / step,
        flops / prefill / peak if peak else None,
        None if beside is None else tokens / step / beside.decode_rate,
        None if beside is None else same_tokens(runs[-1], beside.runs[-1]),
        runs[-1].cache,
        how,
        runs,
    )


def same_tokens(one: Timed, other: Timed) -> float:
    """Share of equal tokens; after the first other one a row goes its own way. Rows whose prompts
    were read later may have fewer tokens: what both have is compared."""
    pairs = [
        (a, b)
        for row, its in zip(one.tokens, other.tokens, strict=True)
        for a, b in zip(row, its, strict=False)
    ]
    return sum(a == b for a, b in pairs) / len(pairs)


def stated_bandwidth(report: Report) -> float | None:
    """Of the GPU as its maker states it, None where that is not known for sure."""
    known = known_gpu(report.hardware[0]["name"]) if report.hardware else None
    names = [name for name, gpu in GPUS.items() if gpu is known]
    return PEAK_BANDWIDTH[names[0]] if names else None


def content(report: Report) -> dict[str, Any]:
    """The JSON file."""
    return {
        **surroundings(),
        "hardware": list(report.hardware),
        "device": str(report.device),
        "threads": torch.get_num_threads(),
        "config": to_dict(report.config),
        "config_digest": config_digest(report.config),
        "model": to_dict(report.model.config),
        "digest": report.model.artifact.digest if report.model.artifact else None,
        "weight_bytes": report.weight_bytes,
        "copy_rate": report.copy_rate,
        "stated_bandwidth": stated_bandwidth(report),
        "skipped": report.skipped,
        "rows": [plain(report, row) for row in report.rows],
    }


def plain(report: Report, row: Row) -> dict[str, Any]:
    stated = stated_bandwidth(report)
    fields = {name: value for name, value in vars(row).items() if name != "runs"}
    return {
        **fields,
        "share_of_copy_rate": row.bandwidth / report.copy_rate,
        "share_of_stated_bandwidth": row.bandwidth / stated if stated else None,
        "runs": [
            {"prefill_seconds": run.prefill_seconds, "step_seconds": list(run.step_seconds)}
            for run in row.runs
        ],
    }


def cells(report: Report, row: Row) -> list[str]:
    """A row of the table; of the bandwidth the share of what the device copies."""
    return [
        row.name,
        str(row.batch),
        str(row.prompt_tokens),
        row.cache,
        f"{row.prefill_rate:,.0f}",
        f"{row.mfu:.1%}" if row.mfu else "-",
        f"{row.decode_rate:,.1f}",
        f"{1e3 * row.step_seconds:.2f}",
        f"{row.step_tokens:.2f}",
        f"{row.bandwidth / report.copy_rate:.1%}",
        f"{row.ratio:.2f}" if row.ratio else "-",
        f"{row.same:.1%}" if row.same is not None else "-",
    ]
