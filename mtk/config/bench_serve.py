"""Options of ``mtk bench serve``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from mtk.config.lengths import FORMS, Lengths, parse_lengths
from mtk.config.schema import group, option
from mtk.errors import Problem

MAX_CLIENTS = 1000


@dataclass(frozen=True, kw_only=True)
class ServerUnderTest:
    """What is measured: a server of its own, or one that runs already."""

    load: str | None = option(None, help="Model that a server of its own is started with.")
    serve_args: str = option(
        "", help="Further options of that mtk serve, as one text: '--dtype bf16 --device cuda'."
    )
    url: str | None = option(
        None, help="Server that runs already (HOST:PORT or URL); of mtk or another OpenAI dialect."
    )
    api_key_file: str | None = option(
        None, help="File whose first line is the key for --url.", runtime=True
    )
    start_timeout: float = option(
        600.0, help="Seconds that the own server may take until it answers.", runtime=True
    )

    def problems(self) -> Iterator[Problem]:
        if (self.load is None) == (self.url is None):
            rule = "is needed, and one of them only: --load MODEL or --url HOST:PORT"
            yield Problem("server", self.load or self.url, rule)
        try:
            words = shlex.split(self.serve_args)
        except ValueError as error:
            yield Problem("serve_args", self.serve_args, f"is no command line ({error})")
            words = []
        if words and self.url is not None:
            yield Problem("serve_args", self.serve_args, "needs --load")
        for word in words:
            if word.split("=")[0] in ("--load", "--host", "--port", "--ready-file", "--json"):
                yield Problem(
                    "serve_args", word, "is said by the benchmark itself", "Leave it out."
                )
        if not self.start_timeout > 0:
            yield Problem("start_timeout", self.start_timeout, "must be greater than 0")


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """What is asked, and how fast."""

    concurrency: tuple[int, ...] = option(
        (), help="Closed loop: so many clients, each asking again at once (default: 1 2 4 8)."
    )
    rate: tuple[float, ...] = option(
        (), help="Open loop: so many requests a second, whether or not earlier ones are done."
    )
    arrivals: Literal["poisson", "even"] = option(
        "poisson", help="How requests of the open loop are spread over time."
    )
    requests: int = option(64, help="Requests of each point of the sweep.")
    warmup: int = option(4, help="Requests before the first point that are not counted.")
    prompt_tokens: str = option("128", help=f"Tokens of a prompt: {FORMS}.")
    new_tokens: str = option("64", help="Tokens asked for, in the same forms.")
    shared_prefix: int = option(0, help="Tokens that all prompts begin with, e.g. for a cache.")
    vocab_size: int | None = option(
        None,
        help="Draw prompts from ids below this (default: the ids of a text, by POST /tokenize).",
    )
    temperature: float = option(1.0, help="0 is greedy.")
    extra_body: str = option(
        "{}", help="""Further fields of each request as JSON: '{"ignore_eos": true}'."""
    )
    request_timeout: float = option(600.0, help="Seconds without a byte that end a request.")
    seed: int = option(1234, help="Seed of prompts, lengths and arrivals.")

    @property
    def clients(self) -> tuple[int, ...]:
        """Points of the closed loop."""
        return self.concurrency or (() if self.rate else (1, 2, 4, 8))

    @property
    def prompts(self) -> Lengths:
        return parse_lengths(self.prompt_tokens)

    @property
    def answers(self) -> Lengths:
        return parse_lengths(self.new_tokens)

    @property
    def extra(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.extra_body)
        return found

    def problems(self) -> Iterator[Problem]:
        for count in self.concurrency:
            if not 1 <= count <= MAX_CLIENTS:
                yield Problem("concurrency", count, f"must lie in 1..{MAX_CLIENTS}")
        for rate in self.rate:
            if not 0 < rate < float("inf"):
                yield Problem("rate", rate, "must be greater than 0")
        least = {"requests": 1, "warmup": 0, "shared_prefix": 0, "temperature": 0, "seed": 0}
        for name, low in least.items():
            if not getattr(self, name) >= low:
                fix = f"Nearest: {low}."
                yield Problem(name, getattr(self, name), f"must be at least {low}", fix)
        if not self.request_timeout > 0:
            yield Problem("request_timeout", self.request_timeout, "must be greater than 0")
        if self.vocab_size is not None and self.vocab_size < 2:
            yield Problem("vocab_size", self.vocab_size, "must be at least 2", "Nearest: 2.")
        yield from self._texts()

    def _texts(self) -> Iterator[Problem]:
        for name in ("prompt_tokens", "new_tokens"):
            try:
                parse_lengths(getattr(self, name))
            except ValueError:
                yield Problem(name, getattr(self, name), f"must be {FORMS}")
        try:
            given = json.loads(self.extra_body)
        except ValueError as error:
            yield Problem("extra_body", self.extra_body, f"is not JSON ({error})")
        else:
            if not isinstance(given, dict):
                yield Problem("extra_body", self.extra_body, "must be a JSON object")


@dataclass(frozen=True, kw_only=True)
class ServeBenchConfig:
    """Everything ``mtk bench serve`` needs."""

    server: ServerUnderTest = group(ServerUnderTest, title="Server")
    traffic: LoadConfig = group(LoadConfig, title="Load")
    max_ttft: float | None = option(
        None, help="Seconds to the first text within which a request counts as good."
    )
    max_token_time: float | None = option(
        None, help="Seconds a token, after the first, within which a request counts as good."
    )
    output: str | None = option(None, help="JSON file of all figures.", runtime=True)
    chart: str | None = option(None, help="PNG file: tokens/s against latency.", runtime=True)

    def problems(self) -> Iterator[Problem]:
        if self.chart is not None and not self.chart.endswith(".png"):
            yield Problem("chart", self.chart, "must end in .png")
        for name in ("max_ttft", "max_token_time"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                yield Problem(name, value, "must be greater than 0")
