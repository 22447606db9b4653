"""Prometheus figures of a server, in a registry of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from serving.engine import Engine

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class _EngineCounters(Collector):
    """What the engine counts itself."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[CounterMetricFamily]:
        cache = self._engine.stats().cache
        for name, text, value in (
            (
                "prefix_asked_tokens",
                "Prompt tokens looked up in known beginnings.",
                cache.prefix_asked,
            ),
            ("prefix_found_tokens", "Prompt tokens not computed again.", cache.prefix_found),
            ("preemptions", "Sequences that lost their blocks to older ones.", cache.preemptions),
            ("draft_tokens", "Guessed tokens computed beside the next ones.", cache.drafted),
            ("draft_accepted", "Guessed tokens that were right.", cache.accepted),
        ):
            yield CounterMetricFamily(f"mtk_{name}", text, value)


class Metrics:
    """Implements :class:`serving.engine.Observer`; also counts HTTP requests."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "mtk_http_requests",
            "HTTP requests by route, method and status.",
            ("route", "method", "status"),
            registry=self.registry,
        )
        self._latency = self._histogram(
            "mtk_http_request_seconds", "From request to end of answer."
        )
        self._queue = self._histogram("mtk_queue_seconds", "From submission to first prefill.")
        self._first = self._histogram(
            "mtk_time_to_first_token_seconds", "From submission to a sequence's first token."
        )
        self._next = self._histogram("mtk_inter_token_seconds", "Between a sequence's tokens.")
        self._prompt = self._counter("mtk_prompt_tokens", "Prompt tokens read.")
        self._generated = self._counter("mtk_generated_tokens", "Tokens generated.")
        self._finished = Counter(
            "mtk_sequences_finished",
            "Sequences by why they ended: stop, length, abort, error.",
            ("reason",),
            registry=self.registry,
        )
        self._gauge("mtk_sequences_running", "Being decoded.", lambda: engine.stats().running)
        self._gauge("mtk_requests_waiting", "Nothing begun yet.", lambda: engine.stats().waiting)
        self._gauge(
            "mtk_cached_tokens", "Tokens in the KV cache.", lambda: engine.stats().cached_tokens
        )
        self._gauge(
            "mtk_cache_blocks_used",
            "Blocks of the KV cache that sequences hold.",
            lambda: engine.stats().cache.blocks_used,
        )
        self._gauge(
            "mtk_cache_blocks_free",
            "Blocks of the KV cache that no sequence holds.",
            lambda: engine.stats().cache.blocks_free,
        )
        self.registry.register(_EngineCounters(engine))
        engine.observe(self)

    def queued(self, seconds: float) -> None:
        self._queue.observe(seconds)

    def prompt(self, tokens: int) -> None:
        self._prompt.inc(tokens)

    def token(self, seconds: float, *, first: bool) -> None:
        self._generated.inc()
        (self._first if first else self._next).observe(seconds)

    def finished(self, reason: str) -> None:
        self._finished.labels(reason).inc()

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        self.requests.labels(route, method, str(status)).inc()
        self._latency.observe(seconds)

    def exposition(self) -> bytes:
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=SECONDS, registry=self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, registry=self.registry)

    def _gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        Gauge(name, text, registry=self.registry).set_function(read)
