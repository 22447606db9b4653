"""``mtk bench serve``: a server under rising load, seen from its clients."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mtk.benchmarks.record import surroundings, write_json
from mtk.config import config_digest, to_dict
from mtk.config.bench_serve import ServeBenchConfig
from mtk.errors import MtkError, WorkerError
from mtk.log import Reporter
from serving.bench.load import Load, questions, vocabulary
from serving.bench.own_server import Start, own_server
from serving.bench.summary import Point, Spread, plain, summarize
from serving.client import Client, Model, read_key

COLUMNS = (
    "load",
    "answered",
    "errors",
    "tokens/s",
    "requests/s",
    "first text ms\np50 / p90 / p99",
    "between texts ms\np50 / p90 / p99",
    "ms a token\np50 / p90 / p99",
    "whole s\np50 / p90 / p99",
)


@dataclass
class Report:
    """model: as the server names it. lineage: the digest of the served artifact, if it has one."""

    config: ServeBenchConfig
    model: Model
    lineage: str | None
    hardware: Sequence[dict[str, Any]]
    points: list[Point]


def bench_serve(
    config: ServeBenchConfig,
    reporter: Reporter,
    *,
    start: Start,
    stop: Callable[[subprocess.Popen[bytes]], int],
    hardware: Sequence[dict[str, Any]] = (),
) -> Report:
    """Measure every point; the JSON file is complete after each of them.

    Raises ConfigError and what a server that does not come up ends with; WorkerError if
    nobody gets an answer any more.
    """
    with _client(config, start, stop) as client:
        ids = vocabulary(client, config.traffic.vocab_size)
        report = Report(config, client.models()[0], _lineage(client), hardware, [])
        reporter.info(f"{report.model.name} at {client.url}, prompts of {len(set(ids))} ids")
        load = Load(client, config.traffic)
        _warm_up(load, config, ids, report.model.context)
        for number, (clients, rate) in enumerate(_loads(config), start=1):
            point = _measure(load, config, ids, report.model.context, (clients, rate), number)
            report.points.append(point)
            reporter.info(_line(point))
            write_json(config.output, content(report))
    return report


@contextmanager
def _client(
    config: ServeBenchConfig, start: Start, stop: Callable[[subprocess.Popen[bytes]], int]
) -> Iterator[Client]:
    under_test, timeout = config.server, config.traffic.request_timeout
    if under_test.url is not None:
        yield Client(under_test.url, api_key=read_key(under_test.api_key_file), timeout=timeout)
        return
    with own_server(under_test, start, stop) as url:
        yield Client(url, timeout=timeout)


def _loads(config: ServeBenchConfig) -> Iterator[tuple[int | None, float | None]]:
    yield from ((clients, None) for clients in config.traffic.clients)
    yield from ((None, rate) for rate in config.traffic.rate)


def _warm_up(load: Load, config: ServeBenchConfig, ids: Sequence[int], context: int | None) -> None:
    """Raises WorkerError when not one of these requests is answered."""
    asked = questions(config.traffic, ids, context, None, 0)[: config.traffic.warmup]
    found = load.closed(asked, 1) if asked else []
    if found and all(one.error for one in found):
        raise WorkerError(f"no request of the warm-up was answered: {found[0].error}.")


def _measure(
    load: Load,
    config: ServeBenchConfig,
    ids: Sequence[int],
    context: int | None,
    point: tuple[int | None, float | None],
    number: int,
) -> Point:
    clients, rate = point
    asked = questions(config.traffic, ids, context, rate, number)
    found = load.open(asked) if clients is None else load.closed(asked, clients)
    return summarize(
        found,
        clients=clients,
        rate=rate,
        max_first=config.max_ttft,
        max_token=config.max_token_time,
    )


def _lineage(client: Client) -> str | None:
    try:
        return client.request("GET", "/v1/lineage").get("digest")
    except MtkError:  # no artifact of mtk, or another server
        return None


def _line(point: Point) -> str:
    failed = sum(point.errors.values())
    first = f", first text {point.first.p50 * 1e3:.0f} ms" if point.first else ""
    return f"{point.name}: {point.tokens_per_second:,.1f} tokens/s{first}" + (
        f", {failed} failed" if failed else ""
    )


def content(report: Report) -> dict[str, Any]:
    """The JSON file."""
    return {
        **surroundings(),
        "hardware": list(report.hardware),
        "config": to_dict(report.config),
        "config_digest": config_digest(report.config),
        "model": {"name": report.model.name, "context": report.model.context},
        "lineage": report.lineage,
        "points": [plain(point) for point in report.points],
    }


def cells(point: Point) -> list[str]:
    """A row of the table."""
    errors = ", ".join(f"{count} x {kind}" for kind, count in point.errors.items())
    return [
        point.name,
        str(point.answered),
        errors or "-",
        f"{point.tokens_per_second:,.1f}",
        f"{point.requests_per_second:,.2f}"
        + ("" if point.goodput is None else f" ({point.goodput:,.2f} good)"),
        _spread(point.first, 1e3),
        _spread(point.gap, 1e3),
        _spread(point.each_token, 1e3),
        _spread(point.whole, 1),
    ]


def _spread(found: Spread | None, scale: float) -> str:
    if found is None:
        return "-"
    values = (scale * value for value in (found.p50, found.p90, found.p99))
    return " / ".join(f"{value:,.1f}" if value >= 10 else f"{value:.2f}" for value in values)
