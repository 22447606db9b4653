"""Stage ``serve``: a model behind the REST server until SIGTERM or SIGINT."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtk.config.serve import CacheConfig, ServeConfig
from mtk.errors import ConfigError, Problem, WorkerError
from mtk.log import Reporter
from mtk.session import Session

if TYPE_CHECKING:
    import torch

    from mtk.launch.rank_server import RankServer
    from mtk.models.gpt import GPT
    from mtk.tokenizers import Tokenizer
    from serving.chat_prompt import ChatPrompt
    from serving.engine_parts import Parts
    from serving.engine_process import EngineProcess
    from serving.open_served import Served
    from serving.settings import ServerSettings
    from serving.tensorrt_llm_engine import TensorRTEngine
    from serving.torch_engine import TorchEngine

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def run(config: ServeConfig, session: Session | None = None) -> None:
    """Serve until a signal; running requests are let end (a second signal ends them).

    Returns normally after a drain. Raises ConfigError (port, keys, ready file),
    ArtifactError (model), WorkerError if the engine died meanwhile.
    """
    with ExitStack() as cleanup:
        ranks = _start_ranks(config)
        if ranks is not None:
            cleanup.callback(ranks.close, 0.0)
        _serve(config, (session or Session()).reporter, ranks, cleanup)


def _serve(
    config: ServeConfig, reporter: Reporter, ranks: RankServer | None, cleanup: ExitStack
) -> None:
    from serving.app import create_app
    from serving.server import (
        HttpServer,
        bind,
        check_ready_file,
        quiet_waitress,
        read_keys,
        ready_file,
        stopped_by_signals,
    )

    keys = read_keys(config.listen.api_key_file)
    check_ready_file(config.listen.ready_file)
    # Bound before the model is read: a taken port is told at once.
    listener = bind(config.listen.host, config.listen.port)
    cleanup.callback(listener.close)
    opened = open_engine(config, reporter, ranks)
    engine = opened.engine
    cleanup.callback(engine.close, 0.0)
    settings = server_settings(
        config, lineage=opened.lineage, keys=keys, chat=opened.chat, log=reporter.info
    )
    quiet_waitress()
    server = HttpServer(
        create_app(engine, settings), listener, drain_timeout=config.limits.drain_timeout
    )
    warn_if_open(config, bool(keys), reporter)
    with stopped_by_signals(server.stop), ready_file(config.listen.ready_file, server.url):
        _say_ready(reporter, opened, settings.model, server.url)
        server.run()
    reporter.info("stopped")
    reporter.event("stopped", url=server.url)
    if engine.died:
        raise WorkerError(f"{engine.died}; the server answered 503 since. Its log has the cause.")


def _start_ranks(config: ServeConfig) -> RankServer | None:
    """What the engine's process is forked from, if it is to have one."""
    if not config.engine_process or config.engine != "torch":
        return None
    from serving.engine_workers import start_server

    ranks = config.tensor_model_parallel_size
    return start_server("stages.serve_process" if ranks == 1 else "stages.serve_shared", ranks)


def _say_ready(reporter: Reporter, opened: OpenedEngine, model: str, url: str) -> None:
    reporter.info(f"{model} is served at {url} (Ctrl-C drains and stops)")
    reporter.event(
        "serving",
        url=url,
        model=model,
        context=opened.engine.context,
        engine_processes=opened.processes,
    )


def server_settings(
    config: ServeConfig,
    *,
    lineage: dict[str, Any] | None,
    keys: frozenset[str],
    chat: ChatPrompt | None,
    log: Callable[[str], None],
) -> ServerSettings:
    """The limits of the configuration, of which the server's have the same names."""
    from serving.settings import ServerSettings

    known = {field.name for field in dataclasses.fields(ServerSettings)}
    limits = {k: v for k, v in vars(config.limits).items() if k in known}
    return ServerSettings(
        model=config.model_name or Path(config.load).resolve().name,
        lineage=lineage,
        api_keys=keys,
        chat=chat,
        log=log,
        **limits,
    )


@dataclass(frozen=True)
class OpenedEngine:
    """lineage: the chain of digests as plain data; None if the model is no mtk artifact. chat:
    how conversations become prompts, if they can. processes: those that the engine runs in beside
    this one."""

    engine: TorchEngine | EngineProcess | TensorRTEngine
    lineage: dict[str, Any] | None
    chat: ChatPrompt | None
    processes: Sequence[int] = ()


def open_engine(
    config: ServeConfig, reporter: Reporter, ranks: RankServer | None = None
) -> OpenedEngine:
    """The model behind the engine that was asked for, in a process that ``ranks`` forks if given.
    Raises ConfigError and ArtifactError."""
    from serving.chat_prompt import open_chat
    from serving.open_served import lineage_of

    if config.engine == "tensorrt-llm":
        from serving.tensorrt_llm_open import open_tensorrt

        found = open_tensorrt(config, reporter.warn)
        chat = open_chat(config.chat_template, found.engine.tokenizer, config.load)
        return OpenedEngine(found.engine, lineage_of(found.artifact), chat)
    if ranks is not None:
        from stages.serve_process import open_process

        return open_process(config, ranks, reporter.warn)
    served = served_model(config)
    chat = open_chat(config.chat_template, served.tokenizer, config.load)
    engine = torch_engine(config, served.model, served.tokenizer, reporter.warn)
    return OpenedEngine(engine, served.lineage, chat)


def served_model(config: ServeConfig) -> Served:
    """The model on its device. Raises ConfigError and ArtifactError."""
    from serving.open_served import open_served

    dtype, device = place_of(config)
    return open_served(config.load, dtype=dtype, device=device)


def torch_engine(
    config: ServeConfig,
    model: GPT,
    tokenizer: Tokenizer,
    warn: Callable[[str], None],
    parts: Parts | None = None,
) -> TorchEngine:
    """An engine in this process; parts: as there. Raises ConfigError."""
    from serving.encoder_prompt import encoder_prompt
    from serving.engine_parts import ALONE
    from serving.torch_engine import TorchEngine

    context = context_length(config, model)
    engine = TorchEngine(
        model,
        tokenizer,
        context=context,
        max_batch_size=config.limits.max_batch_size,
        max_queue=config.limits.max_queue,
        encoder=encoder_prompt(model.config, tokenizer, config.limits.max_seq_length),
        paged=paged_cache(config.cache, model),
        parts=parts or ALONE,
        report=warn,
    )
    if engine.context < context:
        warn(
            f"the cache holds {engine.context} tokens: sequences may not be longer "
            f"(--kv-cache-gib, --kv-cache-tokens, --max-seq-length)"
        )
    return engine


def place_of(config: ServeConfig) -> tuple[torch.dtype, str]:
    """The type of the weights, and ``cuda`` or ``cpu``. Raises ConfigError without a GPU."""
    import torch

    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    device: str = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        rule = "no CUDA device is visible to torch"
        raise ConfigError([Problem("device", "cuda", rule, "Give --device cpu.")])
    return getattr(torch, DTYPES[config.dtype]), device


def context_length(config: ServeConfig, model: GPT) -> int:
    """Tokens of a sequence (with an encoder: of what the decoder writes): --max-seq-length within
    what the model has positions for.

    Raises ConfigError if it asks for more.
    """
    from serving.encoder_prompt import has_encoder

    asked, positions = config.limits.max_seq_length, model.config.positions
    default = model.config.decoder_seq_length if has_encoder(model.config) else positions
    if not model.config.positions_are_limited:
        return asked or default
    if asked is not None and asked > positions:
        rule = f"the model has {positions} positions"
        fix = f"Nearest: {positions}."
        raise ConfigError([Problem("limits.max_seq_length", asked, rule, fix)])
    return asked or default


def paged_cache(config: CacheConfig, model: GPT) -> CacheConfig | None:
    """``config`` if its cache is paged, None for dense ones. Raises ConfigError for a paged cache
    and a model that cannot use it."""
    from serving.paged.layers import can_page

    able = can_page(model)
    if config.kv_cache == "paged" and not able:
        rule = "the model has states, an encoder or biases on scores, which blocks do not hold"
        raise ConfigError([Problem("cache.kv_cache", "paged", rule, "Give --kv-cache dense.")])
    if config.deterministic_mode and not able:
        rule = "needs the paged cache, which does not hold this model's states or biases on scores"
        raise ConfigError(
            [Problem("cache.deterministic_mode", True, rule, "Leave --deterministic-mode out.")]
        )
    return config if able and config.kv_cache != "dense" else None


def warn_if_open(config: ServeConfig, keys: bool, reporter: Reporter) -> None:
    if config.listen.host not in ("127.0.0.1", "localhost", "::1") and not keys:
        reporter.warn(
            f"listening on {config.listen.host} without keys: whoever reaches this address can "
            f"use the model. Give --api-key-file, or keep --host 127.0.0.1."
        )
