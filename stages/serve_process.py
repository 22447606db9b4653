"""The engine of ``mtk serve`` in a process of its own: both sides of its start."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

from mtk.config.serve import ServeConfig
from mtk.convert.open_model import open_tokenizer
from mtk.convert.source import find_source
from mtk.launch.process import Place
from mtk.launch.rank_server import RankServer
from serving.chat_prompt import open_chat
from serving.engine_child import Relay
from serving.engine_messages import Warned, connect
from serving.engine_process import EngineProcess
from serving.engine_workers import Workers
from serving.open_served import lineage_of
from stages.serve import OpenedEngine, served_model, torch_engine


def open_process(
    config: ServeConfig, server: RankServer, warn: Callable[[str], None]
) -> OpenedEngine:
    """Let ``server`` fork the engine's process, and open here what this one itself needs.

    Raises what either side raises: ConfigError, ArtifactError, DataError (chat template), or
    WorkerError for a process that ended.
    """
    limits = config.limits
    workers = Workers(
        run_engine,
        (config,),
        server,
        ranks=config.tensor_model_parallel_size,
        timeout=limits.step_timeout,
    )
    try:
        source = find_source(config.load)
        tokenizer = open_tokenizer(source)
        chat = open_chat(config.chat_template, tokenizer, config.load)
        engine = EngineProcess(
            workers,
            tokenizer,
            max_batch_size=limits.max_batch_size,
            max_queue=limits.max_queue,
            step_timeout=limits.step_timeout,
            report=warn,
        )
    except BaseException:
        workers.close()
        raise
    return OpenedEngine(engine, lineage_of(source.artifact), chat, workers.processes)


def run_engine(place: Place, folder: Path, config: ServeConfig) -> None:
    """What each of the engine's processes does. It ends when the server asks for it, or is gone."""
    # Whoever stops a whole group of processes means the server, which lets requests end first.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if place.world > 1:
        # Brings much with it that one process has no use for.
        from stages.serve_shared import run_rank

        run_rank(place, folder, config)
        return
    line = connect(folder)

    def warn(text: str) -> None:
        line.send(Warned(text))

    served = served_model(config)
    engine = torch_engine(config, served.model, served.tokenizer, warn)
    Relay(line, engine).serve()
    line.close()
