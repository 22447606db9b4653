"""What an engine's process of the tests does, and how tests start it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mtk.config.serve import CacheConfig
from mtk.errors import ConfigError, Problem
from mtk.launch.process import Place
from mtk.launch.rank_server import RankServer
from serving.engine_child import Relay
from serving.engine_messages import Warned, connect
from serving.engine_process import EngineProcess
from serving.engine_workers import Workers
from serving.torch_engine import TorchEngine
from tests.serving.models import ByteTokenizer, tiny_model

CONTEXT = 96


@dataclass(frozen=True)
class Faults:
    """tick: seconds that each step takes besides. fails: the third step raises. hangs: it does not
    end. refuses: the engine cannot be opened."""

    tick: float = 0.0
    fails: bool = False
    hangs: bool = False
    refuses: bool = False


def serve_tiny(place: Place, folder: Path, faults: Faults, options: dict[str, Any]) -> None:
    """The tiny model's engine for whoever listens in ``folder``."""
    del place
    torch.set_num_threads(1)
    line = connect(folder)
    line.send(Warned("it begins"))
    if faults.refuses:
        raise ConfigError([Problem("limits.max_seq_length", 9, "is seeded", "Nearest: 1.")])
    real, steps = TorchEngine._tick, [0]

    def tick(engine: TorchEngine) -> None:
        steps[0] += 1
        time.sleep(faults.tick)
        if faults.fails and steps[0] > 2:
            raise MemoryError("seeded")
        while faults.hangs and steps[0] > 2:
            time.sleep(0.01)
        real(engine)

    TorchEngine._tick = tick  # type: ignore[method-assign]
    engine = TorchEngine(
        tiny_model(),
        ByteTokenizer(),
        context=CONTEXT,
        report=lambda text: line.send(Warned(text)),
        **{"paged": CacheConfig(), **options},
    )
    Relay(line, engine).serve()
    line.close()


def start_tiny(
    server: RankServer,
    faults: Faults,
    *,
    report: Callable[[str], None] = lambda text: None,
    max_batch_size: int = 8,
    max_queue: int = 64,
    step_timeout: float = 60.0,
    silence: float = 30.0,
    **options: Any,
) -> EngineProcess:
    """An engine in a process that ``server`` forks."""
    given = {"max_batch_size": max_batch_size, **options}
    workers = Workers(serve_tiny, (faults, given), server)
    try:
        return EngineProcess(
            workers,
            ByteTokenizer(),
            max_batch_size=max_batch_size,
            max_queue=max_queue,
            step_timeout=step_timeout,
            silence=silence,
            report=report,
        )
    except BaseException:
        workers.close()
        raise
