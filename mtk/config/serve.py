"""Options of ``mtk serve``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mtk.config.schema import group, option
from mtk.config.serve_engines import TensorRTConfig
from mtk.errors import Problem


@dataclass(frozen=True, kw_only=True)
class ListenConfig:
    """Where the server listens, and who may use it."""

    host: str = option(
        "127.0.0.1", help="Address to listen on; 0.0.0.0 is every interface.", runtime=True
    )
    port: int = option(5000, help="Port; 0 takes a free one and prints it.", runtime=True)
    api_key_file: str | None = option(
        None,
        help="File with one key a line; every route but /livez then needs "
        "Authorization: Bearer KEY.",
        runtime=True,
    )
    ready_file: str | None = option(
        None, help="Write the server's URL into this file once it answers.", runtime=True
    )

    def problems(self) -> Iterator[Problem]:
        if not 0 <= self.port <= 65535:
            fix = f"Nearest: {min(max(self.port, 0), 65535)}."
            yield Problem("port", self.port, "must lie in 0..65535", fix)


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """How much is taken on at once; what is over it is refused at once, never left hanging."""

    max_batch_size: int = option(8, help="Sequences decoded together.", runtime=True)
    max_seq_length: int | None = option(
        None,
        help="Most tokens of prompt and continuation together (default: the model's positions).",
        runtime=True,
    )
    max_queue: int = option(
        64, help="Requests that may wait for the engine; more get 429.", runtime=True
    )
    max_concurrency: int = option(64, help="Requests answered at once; more get 429.", runtime=True)
    max_body_bytes: int = option(
        2_000_000, help="Largest request body; a larger one gets 413.", runtime=True
    )
    request_timeout: float = option(
        600.0, help="Seconds until a request is given up with 504.", runtime=True
    )
    drain_timeout: float = option(
        30.0, help="Seconds that running requests have to end after SIGTERM.", runtime=True
    )

    def problems(self) -> Iterator[Problem]:
        for name in ("max_batch_size", "max_concurrency", "max_body_bytes"):
            if getattr(self, name) < 1:
                yield Problem(name, getattr(self, name), "must be at least 1", "Nearest: 1.")
        if self.max_seq_length is not None and self.max_seq_length < 2:
            yield Problem("max_seq_length", self.max_seq_length, "must be at least 2")
        if self.max_queue < 0:
            yield Problem("max_queue", self.max_queue, "must not be negative", "Nearest: 0.")
        if not 0 < self.request_timeout < float("inf"):
            yield Problem("request_timeout", self.request_timeout, "must be greater than 0")
        if not 0 <= self.drain_timeout < float("inf"):
            yield Problem("drain_timeout", self.drain_timeout, "must not be negative")
        if self.max_concurrency > 1000:
            rule = "takes one thread each; at most 1000"
            yield Problem("max_concurrency", self.max_concurrency, rule, "Nearest: 1000.")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Everything ``mtk serve`` needs."""

    load: str = option(help="Native checkpoint, Hugging Face directory or quantized directory.")
    engine: Literal["torch", "tensorrt-llm"] = option(
        "torch", help="What decodes; tensorrt-llm must be installed besides.", runtime=True
    )
    model_name: str | None = option(
        None, help="The model's name in the API (default: name of the --load folder).", runtime=True
    )
    dtype: Literal["fp32", "bf16", "fp16"] = option("fp32", help="Precision of the weights.")
    device: Literal["auto", "cpu", "cuda"] = option("auto", help="Where to run.", runtime=True)
    num_threads: int | None = option(
        None, help="CPU threads of torch (default: all cores).", runtime=True
    )
    listen: ListenConfig = group(ListenConfig, title="Address and access")
    limits: LimitsConfig = group(LimitsConfig, title="Limits")
    tensorrt: TensorRTConfig = group(TensorRTConfig, title="TensorRT-LLM")

    def problems(self) -> Iterator[Problem]:
        if self.engine == "torch" and self.tensorrt != TensorRTConfig():
            yield Problem("engine", "torch", "has no TensorRT-LLM options", "Leave them out.")
        if self.engine == "tensorrt-llm" and self.device == "cpu":
            yield Problem("device", "cpu", "TensorRT-LLM needs a GPU", "Give --engine torch.")
        if self.num_threads is not None and self.num_threads < 1:
            yield Problem("num_threads", self.num_threads, "must be at least 1", "Nearest: 1.")
        if self.model_name == "":
            yield Problem("model_name", "", "must not be empty")
