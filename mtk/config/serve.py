"""Options of ``mtk serve``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mtk.config.schema import group, option
from mtk.config.serve_engines import TensorRTConfig
from mtk.errors import Problem

AT_LEAST_ONE = (
    "max_batch_size",
    "max_concurrency",
    "max_body_bytes",
    "max_prompts",
    "max_sequences",
    "max_prompt_tokens",
    "max_new_tokens",
    "max_stop_length",
    "max_schema_bytes",
    "max_beam_width",
)

TIMEOUTS = ("request_timeout", "read_timeout", "write_timeout", "probe_timeout", "step_timeout")


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
        help="Most tokens of prompt and continuation together (default: the model's positions); "
        "of a T5 each of the two (default: positions and --decoder-seq-length of its training).",
        runtime=True,
    )
    max_queue: int = option(
        64, help="Requests that may wait for the engine; more get 429.", runtime=True
    )
    max_concurrency: int = option(64, help="Requests answered at once; more get 429.", runtime=True)
    max_body_bytes: int = option(
        2_000_000, help="Largest request body; a larger one gets 413.", runtime=True
    )
    max_prompts: int = option(128, help="Prompts of a request.", runtime=True)
    max_sequences: int = option(128, help="Prompts x n of a request.", runtime=True)
    max_prompt_tokens: int | None = option(
        None, help="Tokens of a prompt (default: what the context holds).", runtime=True
    )
    max_new_tokens: int | None = option(
        None, help="Tokens a sequence may ask for (default: what the context holds).", runtime=True
    )
    max_stop_strings: int = option(16, help="Stop strings of a request.", runtime=True)
    max_stop_length: int = option(256, help="Characters of a stop string.", runtime=True)
    max_top_logprobs: int = option(20, help="Alternatives told for a token.", runtime=True)
    max_logit_bias: int = option(300, help="Tokens in logit_bias.", runtime=True)
    max_schema_bytes: int = option(
        65_536, help="Size of the JSON schema of response_format.", runtime=True
    )
    max_beam_width: int = option(32, help="Beams of a request.", runtime=True)
    request_timeout: float = option(
        600.0, help="Seconds until a request is given up with 504.", runtime=True
    )
    read_timeout: float = option(
        60.0, help="Seconds that a request may take to arrive.", runtime=True
    )
    write_timeout: float = option(
        60.0, help="Seconds that a client may leave an answer unread.", runtime=True
    )
    probe_timeout: float = option(
        2.5, help="Seconds for the token of a health check; then /readyz is red.", runtime=True
    )
    step_timeout: float = option(
        300.0,
        help="Seconds that one step of the engine may take; then it counts as dead (of an engine "
        "in its own process).",
        runtime=True,
    )
    drain_timeout: float = option(
        30.0, help="Seconds that running requests have to end after SIGTERM.", runtime=True
    )

    def problems(self) -> Iterator[Problem]:
        for name in AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                yield Problem(name, value, "must be at least 1", "Nearest: 1.")
        for name in ("max_queue", "max_stop_strings", "max_logit_bias"):
            if getattr(self, name) < 0:
                yield Problem(name, getattr(self, name), "must not be negative", "Nearest: 0.")
        if not 0 <= self.max_top_logprobs <= 20:
            fix = f"Nearest: {min(max(self.max_top_logprobs, 0), 20)}."
            yield Problem("max_top_logprobs", self.max_top_logprobs, "must lie in 0..20", fix)
        if self.max_seq_length is not None and self.max_seq_length < 2:
            yield Problem("max_seq_length", self.max_seq_length, "must be at least 2")
        for name in TIMEOUTS:
            if not 0 < getattr(self, name) < float("inf"):
                yield Problem(name, getattr(self, name), "must be greater than 0")
        if not 0 <= self.drain_timeout < float("inf"):
            yield Problem("drain_timeout", self.drain_timeout, "must not be negative")
        if self.max_concurrency > 1000:
            rule = "takes one thread each; at most 1000"
            yield Problem("max_concurrency", self.max_concurrency, rule, "Nearest: 1000.")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Where keys and values of running sequences are kept, and how steps are made of them."""

    kv_cache: Literal["auto", "paged", "dense"] = option(
        "auto",
        help="paged keeps them in blocks that sequences share, dense a row for each sequence; auto "
        "is paged where the model can (no Mamba layers, no biases on scores, no encoder).",
        runtime=True,
    )
    kv_cache_tokens: int | None = option(
        None,
        help="Tokens that the paged cache holds (default: all that --max-batch-size sequences can "
        "have, on a GPU twice that if 85% of its free memory is enough).",
        runtime=True,
    )
    kv_cache_gib: float | None = option(
        None, help="The same in GiB of memory, 2^30 bytes.", runtime=True
    )
    max_batched_tokens: int | None = option(
        None,
        help="Tokens computed in one step; longer prompts are read in several, between which "
        "others get their tokens (default: 2048, on a GPU 8192).",
        runtime=True,
    )
    prefix_caching: bool = option(
        True, help="Compute the beginning that prompts have in common only once.", runtime=True
    )
    cuda_graphs: bool = option(
        True, help="Launch a step of decoding as one CUDA graph.", runtime=True
    )
    speculation: Literal["off", "lookup"] = option(
        "lookup",
        help="lookup guesses tokens by what followed the last ones earlier in the text, and "
        "computes them in one step with the next; only what single steps would choose is taken.",
        runtime=True,
    )
    draft_tokens: int = option(
        15, help="Tokens guessed for a sequence in one step, at most.", runtime=True
    )
    lookup_ngram: int = option(
        5, help="Last tokens of a text that are looked for in it, at most.", runtime=True
    )
    lookup_min_ngram: int = option(
        2, help="Of these so many must be found for a guess.", runtime=True
    )
    speculation_tokens: int = option(
        32,
        help="Tokens of a decode step with guesses, at most; batches of so many sequences have "
        "none.",
        runtime=True,
    )

    deterministic_mode: bool = option(
        False,
        help="Compute in steps of fixed shapes, so that an answer is the same to the last bit of "
        "its log-probabilities whatever else is served. Each step then costs that of a full batch.",
        runtime=True,
    )

    def problems(self) -> Iterator[Problem]:
        if self.deterministic_mode and self.kv_cache == "dense":
            rule = "needs the paged cache"
            yield Problem("deterministic_mode", True, rule, "Leave --kv-cache dense out.")
        for name in ("kv_cache_tokens", "max_batched_tokens"):
            value = getattr(self, name)
            if value is not None and value < 16:
                yield Problem(name, value, "must be at least 16, a block", "Nearest: 16.")
        for name in ("draft_tokens", "lookup_min_ngram", "speculation_tokens"):
            value = getattr(self, name)
            if value < 1:
                yield Problem(name, value, "must be at least 1", "Nearest: 1.")
        if self.lookup_ngram < self.lookup_min_ngram:
            rule = f"must not be below lookup_min_ngram = {self.lookup_min_ngram}"
            yield Problem(
                "lookup_ngram", self.lookup_ngram, rule, f"Nearest: {self.lookup_min_ngram}."
            )
        gib = self.kv_cache_gib
        if gib is not None and not 0 < gib < float("inf"):
            yield Problem("kv_cache_gib", gib, "must be greater than 0")
        if gib is not None and self.kv_cache_tokens is not None:
            rule = "is the same as kv_cache_tokens in another unit"
            yield Problem("kv_cache_gib", gib, rule, "Leave one of them out.")
        if self.kv_cache == "dense":
            for name in ("kv_cache_tokens", "kv_cache_gib"):
                if getattr(self, name) is not None:
                    rule = "does not count with --kv-cache dense, which grows as it needs"
                    yield Problem(name, getattr(self, name), rule, "Leave one of them out.")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Everything ``mtk serve`` needs."""

    load: str = option(help="Native checkpoint, Hugging Face directory or quantized directory.")
    engine: Literal["torch", "tensorrt-llm"] = option(
        "torch", help="What decodes; tensorrt-llm must be installed besides.", runtime=True
    )
    engine_process: bool = option(
        True,
        help="Run the engine in a process of its own, beside the one that answers HTTP (torch).",
        runtime=True,
    )
    tensor_model_parallel_size: int = option(
        1,
        help="Processes, each on a GPU of its own, that share each matrix (torch).",
        aliases=("--tp", "--tensor-parallel"),
        runtime=True,
    )
    model_name: str | None = option(
        None, help="The model's name in the API (default: name of the --load folder).", runtime=True
    )
    chat_template: str | None = option(
        None,
        help="For /v1/chat/completions: chatml, llama3, plain, or a file with a Jinja template "
        "(default: what the model's tokenizer brings).",
        runtime=True,
    )
    dtype: Literal["fp32", "bf16", "fp16"] = option("fp32", help="Precision of the weights.")
    device: Literal["auto", "cpu", "cuda"] = option("auto", help="Where to run.", runtime=True)
    num_threads: int | None = option(
        None, help="CPU threads of torch (default: all cores).", runtime=True
    )
    listen: ListenConfig = group(ListenConfig, title="Address and access")
    limits: LimitsConfig = group(LimitsConfig, title="Limits")
    cache: CacheConfig = group(CacheConfig, title="Cache and batching")
    tensorrt: TensorRTConfig = group(TensorRTConfig, title="TensorRT-LLM")

    def problems(self) -> Iterator[Problem]:
        if self.engine == "torch" and self.tensorrt != TensorRTConfig():
            yield Problem("engine", "torch", "has no TensorRT-LLM options", "Leave them out.")
        if self.engine == "tensorrt-llm" and self.cache.deterministic_mode:
            rule = "is what --engine torch can do"
            yield Problem("cache.deterministic_mode", True, rule, "Leave one of them out.")
        if self.engine == "tensorrt-llm" and self.device == "cpu":
            yield Problem("device", "cpu", "TensorRT-LLM needs a GPU", "Give --engine torch.")
        if self.num_threads is not None and self.num_threads < 1:
            yield Problem("num_threads", self.num_threads, "must be at least 1", "Nearest: 1.")
        yield from self._sharing_problems()
        for name in ("model_name", "chat_template"):
            if getattr(self, name) == "":
                yield Problem(name, "", "must not be empty")

    def _sharing_problems(self) -> Iterator[Problem]:
        ranks, name = self.tensor_model_parallel_size, "tensor_model_parallel_size"
        if ranks < 1:
            yield Problem(name, ranks, "must be at least 1", "Nearest: 1.")
        if ranks > 1 and not self.engine_process:
            rule = "needs processes of the engine's own"
            yield Problem(name, ranks, rule, "Leave out --no-engine-process.")
        if ranks > 1 and self.engine != "torch":
            rule = "is of the torch engine; TensorRT-LLM has --tensor-parallel-size"
            yield Problem(name, ranks, rule, "Nearest: 1.")
