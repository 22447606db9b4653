"""A package in the place of ``tensorrt_llm`` 1.x: the same names, arguments and habits, a model of
mtk inside, on the CPU.

Facts that it keeps: ``LLM`` refuses arguments it does not know with ValueError; ``SamplingParams``
is keyword-only, draws only if ``top_k`` or ``top_p`` is said, and has ``best_of`` follow ``n``;
without a tokenizer ``end_id`` must be given; ``logprobs`` of 0 is none; a token of
``stop_token_ids`` is taken off the answer unless ``include_stop_str_in_output``; an answer can be
awaited piece by piece only if an event loop ran when it was asked for; ``abort`` ends it with
``cancelled``.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from mtk.convert.open_model import open_model
from mtk.models.gpt import GPT

KNOWN = (
    "kv_cache_config",
    "cuda_graph_config",
    "max_batch_size",
    "max_num_tokens",
    "max_seq_len",
    "enable_chunked_prefill",
)


@dataclass(kw_only=True)
class SamplingParams:
    end_id: int | None = None
    pad_id: int | None = None
    max_tokens: int = 32
    bad: Any = None
    bad_token_ids: list[int] | None = None
    stop: Any = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    top_k: int | None = None
    top_p: float | None = None
    top_p_min: float | None = None
    top_p_decay: float | None = None
    seed: int | None = None
    temperature: float | None = None
    min_tokens: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_context_logits: bool = False
    return_generation_logits: bool = False
    exclude_input_from_output: bool = True
    ignore_eos: bool = False
    detokenize: bool = True
    add_special_tokens: bool = True
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        self.best_of = self.best_of or self.n
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError("temperature must be > 0")

    @property
    def greedy(self) -> bool:
        return self.top_k in (None, 1) and self.top_p in (None, 0.0)


@dataclass
class KvCacheConfig:
    enable_block_reuse: bool = True
    free_gpu_memory_fraction: float | None = None
    dtype: str = "auto"


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: Any = None


class RequestOutput:
    """Also the iterator over its own growth."""

    def __init__(self, prompt: list[int], sampling: SamplingParams) -> None:
        self.prompt_token_ids, self.sampling_params = prompt, sampling
        self.outputs = [CompletionOutput(0)]
        self.context_logits: Any = None
        self.finished = False
        self.aborted = threading.Event()
        try:
            self._loop: Any = asyncio.get_running_loop()
            self._queue: asyncio.Queue[Any] = asyncio.Queue()
        except RuntimeError:
            self._loop = None

    def abort(self) -> None:
        self.aborted.set()

    def put(self, response: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, response)

    def __aiter__(self) -> RequestOutput:
        return self

    async def __anext__(self) -> RequestOutput:
        assert self._loop is not None, "the event loop was not present during initialization"
        if self.finished:
            raise StopAsyncIteration
        response = await self._queue.get()
        if isinstance(response, Exception):
            self.finished = True
            raise response
        tokens, logprobs, context_logits, reason = response
        output = self.outputs[0]
        output.token_ids += tokens
        output.logprobs += logprobs
        self.finished = reason is not None
        self.context_logits = context_logits
        if reason == "stop_words":
            output.finish_reason, output.stop_reason = "stop", output.token_ids[-1]
            if not self.sampling_params.include_stop_str_in_output:
                output.token_ids.pop()
        elif reason is not None:
            output.finish_reason = reason
        return self


class LLM:
    """tick: seconds that a token takes. failure: what the next requests end with."""

    tick = 0.0
    failure: Exception | None = None

    def __init__(
        self,
        model: str | Path,
        tokenizer: Any = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        for name in kwargs:
            if name not in KNOWN:
                raise ValueError(f"LLM got invalid argument: {name}")
        assert dtype in ("auto", "bfloat16", "float16", "float32")
        if tensor_parallel_size > 1:
            raise RuntimeError(
                f"Only 1 GPUs are available, but {tensor_parallel_size} are required."
            )
        self.tokenizer = None if skip_tokenizer_init else object()
        self.kwargs = {"dtype": dtype, **kwargs}
        self.requests: list[RequestOutput] = []
        self.stopped = False
        self._model: GPT = open_model(model).model
        self._lock = threading.Lock()

    def generate_async(
        self,
        inputs: list[int],
        sampling_params: SamplingParams | None = None,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        streaming: bool = False,
    ) -> RequestOutput:
        sampling = sampling_params or SamplingParams()
        if sampling.end_id is None and self.tokenizer is None:
            raise ValueError("tokenizer is required to reset end_id if it is None")
        if len(inputs) + sampling.max_tokens > self.kwargs["max_seq_len"]:
            raise ValueError("the request is longer than max_seq_len")
        result = RequestOutput(list(inputs), sampling)
        self.requests.append(result)
        threading.Thread(target=self._generate, args=(result, streaming), daemon=True).start()
        return result

    def shutdown(self) -> None:
        self.stopped = True

    @torch.inference_mode()
    def _generate(self, result: RequestOutput, streaming: bool) -> None:
        sampling, ids = result.sampling_params, list(result.prompt_token_ids)
        held: list[Any] = [[], []]
        generator = torch.Generator().manual_seed((sampling.seed or 0) % 2**63)
        reason, context = None, None
        while reason is None:
            if self.failure is not None:
                result.put(self.failure)
                return
            time.sleep(self.tick)
            with self._lock:
                logits = self._model(torch.tensor([ids]))[0]
            if context is None and sampling.return_context_logits:
                context = logits.float()
            token = _choose(logits[-1], sampling, generator)
            ids.append(token)
            held[0].append(token)
            if sampling.logprobs:  # 0 is as good as None
                held[1].append(_top(logits[-1], token, sampling.logprobs))
            reason = self._reason(result, ids, token)
            if streaming or reason:
                result.put((*held, context if reason else None, reason))
                held = [[], []]

    def _reason(self, result: RequestOutput, ids: list[int], token: int) -> str | None:
        sampling = result.sampling_params
        if result.aborted.is_set():
            return "cancelled"
        if token == sampling.end_id and not sampling.ignore_eos:
            return "stop"
        if token in (sampling.stop_token_ids or ()):
            return "stop_words"
        full = len(ids) - len(result.prompt_token_ids) >= sampling.max_tokens
        return "length" if full else None


def _choose(logits: torch.Tensor, sampling: SamplingParams, generator: torch.Generator) -> int:
    if sampling.greedy:
        return int(logits.argmax())
    scores = logits / (sampling.temperature or 1.0)
    if sampling.top_k:
        scores[scores < scores.topk(sampling.top_k).values[-1]] = -torch.inf
    return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))


def _top(logits: torch.Tensor, token: int, count: int) -> dict[int, Logprob]:
    values = logits.float().log_softmax(-1)
    best = values.topk(count)
    pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    found = {index: Logprob(value, rank) for rank, (value, index) in enumerate(pairs, start=1)}
    found.setdefault(token, Logprob(values[token].item(), int((values > values[token]).sum()) + 1))
    return found


@contextmanager
def installed() -> Iterator[ModuleType]:
    """``import tensorrt_llm`` finds this, while the block runs."""
    from importlib.machinery import ModuleSpec

    package, llmapi = ModuleType("tensorrt_llm"), ModuleType("tensorrt_llm.llmapi")
    package.__spec__ = ModuleSpec("tensorrt_llm", None)
    package.LLM, package.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    package.llmapi = llmapi  # type: ignore[attr-defined]
    llmapi.KvCacheConfig = KvCacheConfig  # type: ignore[attr-defined]
    sys.modules |= {"tensorrt_llm": package, "tensorrt_llm.llmapi": llmapi}
    try:
        yield package
    finally:
        del sys.modules["tensorrt_llm"], sys.modules["tensorrt_llm.llmapi"]
