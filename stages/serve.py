"""Stage ``serve``: a model behind the REST server until SIGTERM or SIGINT."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtk.config.serve import ServeConfig
from mtk.errors import ConfigError, Problem, WorkerError
from mtk.log import Reporter
from mtk.session import Session

if TYPE_CHECKING:
    import torch

    from mtk.models.gpt import GPT
    from serving.tensorrt_llm_engine import TensorRTEngine
    from serving.torch_engine import TorchEngine

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def run(config: ServeConfig, session: Session | None = None) -> None:
    """Serve until a signal; running requests are let end (a second signal ends them).

    Returns normally after a drain. Raises ConfigError (port, keys, ready file),
    ArtifactError (model), WorkerError if the engine died meanwhile.
    """
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
    from serving.settings import ServerSettings

    reporter = (session or Session()).reporter
    limits = config.limits
    keys = read_keys(config.listen.api_key_file)
    check_ready_file(config.listen.ready_file)
    # Bound before the model is read: a taken port is told at once.
    listener = bind(config.listen.host, config.listen.port)
    try:
        opened = open_engine(config, reporter)
        engine, context = opened.engine, opened.engine.context
        settings = ServerSettings(
            model=config.model_name or Path(config.load).resolve().name,
            lineage=opened.lineage,
            api_keys=keys,
            max_concurrency=limits.max_concurrency,
            max_body_bytes=limits.max_body_bytes,
            request_timeout=limits.request_timeout,
            log=reporter.info,
        )
        quiet_waitress()
        server = HttpServer(
            create_app(engine, settings), listener, drain_timeout=limits.drain_timeout
        )
    except BaseException:
        listener.close()
        raise
    warn_if_open(config, bool(keys), reporter)
    with stopped_by_signals(server.stop), ready_file(config.listen.ready_file, server.url):
        reporter.info(f"{settings.model} is served at {server.url} (Ctrl-C drains and stops)")
        reporter.event("serving", url=server.url, model=settings.model, context=context)
        server.run()
    reporter.info("stopped")
    reporter.event("stopped", url=server.url)
    if engine.died:
        raise WorkerError(f"{engine.died}; the server answered 503 since. Its log has the cause.")


@dataclass(frozen=True)
class OpenedEngine:
    """lineage: the chain of digests as plain data; None if the model is no mtk artifact."""

    engine: TorchEngine | TensorRTEngine
    lineage: dict[str, Any] | None


def open_engine(config: ServeConfig, reporter: Reporter) -> OpenedEngine:
    """The model behind the engine that was asked for. Raises ConfigError and ArtifactError."""
    from serving.open_served import lineage_of, open_served

    if config.engine == "tensorrt-llm":
        from serving.tensorrt_llm_open import open_tensorrt

        found = open_tensorrt(config, reporter.warn)
        return OpenedEngine(found.engine, lineage_of(found.artifact))
    from serving.torch_engine import TorchEngine

    dtype, device = _place(config)
    served = open_served(config.load, dtype=dtype, device=device)
    engine = TorchEngine(
        served.model,
        served.tokenizer,
        context=context_length(config, served.model),
        max_batch_size=config.limits.max_batch_size,
        max_queue=config.limits.max_queue,
        report=reporter.warn,
    )
    return OpenedEngine(engine, served.lineage)


def _place(config: ServeConfig) -> tuple[torch.dtype, str]:
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
    """Tokens of a sequence: --max-seq-length within what the model has positions for.

    Raises ConfigError if it asks for more.
    """
    asked, positions = config.limits.max_seq_length, model.config.positions
    if not model.config.positions_are_limited:
        return asked or positions
    if asked is not None and asked > positions:
        rule = f"the model has {positions} positions"
        fix = f"Nearest: {positions}."
        raise ConfigError([Problem("limits.max_seq_length", asked, rule, fix)])
    return asked or positions


def warn_if_open(config: ServeConfig, keys: bool, reporter: Reporter) -> None:
    if config.listen.host not in ("127.0.0.1", "localhost", "::1") and not keys:
        reporter.warn(
            f"listening on {config.listen.host} without keys: whoever reaches this address can "
            f"use the model. Give --api-key-file, or keep --host 127.0.0.1."
        )
