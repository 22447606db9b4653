"""A server on a random model, in a process of its own."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.serving.wire import call, eventually

if TYPE_CHECKING:
    from serving.engine import Engine

ROOT = Path(__file__).parents[3]
# The demo's has the sizes of the recipe that `make demo` trains; the vocabulary is bytes in both.
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "demo": {
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "activation": "swiglu",
        "add_bias_linear": False,
        "num_layers": 4,
        "hidden_size": 192,
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "init_method_std": 0.12,
    },
}


@dataclass
class ServerProcess:
    url: str
    process: subprocess.Popen[str]

    def state(self) -> dict[str, Any]:
        status, found, _ = call(self.url, "GET", "/health")
        assert status == 200, found
        return dict(found)

    def figure(self, name: str) -> float:
        """A sample of ``/metrics`` without labels."""
        _, text, _ = call(self.url, "GET", "/metrics")
        (line,) = [ln for ln in text.decode().splitlines() if ln.split(" ")[0] == name]
        return float(line.split(" ")[1])

    def leaks(self, seconds: float = 5.0) -> dict[str, float]:
        """What is still held when nobody asks any more; empty is good."""
        names = ("mtk_sequences_running", "mtk_requests_waiting", "mtk_cached_tokens")

        def held() -> dict[str, float]:
            found = {name: self.figure(name) for name in names}
            return {k: v for k, v in {**found, "in_flight": self.state()["in_flight"]}.items() if v}

        eventually(lambda: not held(), seconds)
        return held()

    def terminate(self) -> tuple[int, str]:
        """SIGTERM; exit code and what was said on stderr."""
        self.process.send_signal(signal.SIGTERM)
        _, err = self.process.communicate(timeout=60)
        return self.process.returncode, err


@contextmanager
def server_process(
    tick: float = 0.0, *, own_process: bool = False, **limits: Any
) -> Iterator[ServerProcess]:
    """tick: seconds that each step takes at least. own_process: the engine has one, as in ``mtk
    serve``. limits: of engine and server; beside an engine in the server's process also model: one
    of ``MODELS``, deterministic_mode: of the engine, freed_log: see
    :mod:`tests.serving.load.leaving`."""
    command = [sys.executable, "-m", "tests.serving.load.server_process"]
    process = subprocess.Popen(
        [*command, json.dumps({"tick": tick, "own_process": own_process, **limits})],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        url = process.stdout.readline().strip()
        assert url, process.stderr.read()
        yield ServerProcess(url, process)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def main() -> None:
    from serving.app import create_app
    from serving.chat_prompt import open_chat
    from serving.server import HttpServer, bind, quiet_waitress, stopped_by_signals
    from serving.settings import ServerSettings
    from tests.serving.models import ByteTokenizer

    parser = argparse.ArgumentParser()
    parser.add_argument("options", type=json.loads)
    options = parser.parse_args().options
    tick, own_process = options.pop("tick"), options.pop("own_process")
    sizes = {k: options.pop(k) for k in ("max_batch_size", "max_queue") if k in options}
    inside = {
        k: options.pop(k) for k in ("model", "deterministic_mode", "freed_log") if k in options
    }
    chat = open_chat("plain", ByteTokenizer(), "tiny")
    settings = ServerSettings(model="tiny", chat=chat, **options)
    quiet_waitress()
    with ExitStack() as cleanup:
        engine = _beside(tick, sizes, cleanup) if own_process else _inside(tick, sizes, **inside)
        server = HttpServer(create_app(engine, settings), bind("127.0.0.1", 0))
        with stopped_by_signals(server.stop):
            print(server.url, flush=True)
            server.run()


def _inside(
    tick: float,
    sizes: dict[str, Any],
    *,
    model: str = "tiny",
    deterministic_mode: bool = False,
    freed_log: str | None = None,
) -> Engine:
    import torch

    from mtk.config.serve import CacheConfig
    from serving.torch_engine import TorchEngine
    from tests.serving.load.leaving import write_down
    from tests.serving.models import ByteTokenizer, tiny_model

    torch.set_num_threads(1)
    if tick:
        real = TorchEngine._tick

        def slow(engine: TorchEngine) -> None:
            time.sleep(tick)
            real(engine)

        TorchEngine._tick = slow  # type: ignore[method-assign]
    if freed_log:
        write_down(TorchEngine, freed_log)
    cache = CacheConfig(deterministic_mode=deterministic_mode)
    made = tiny_model(**MODELS[model])
    return TorchEngine(made, ByteTokenizer(), context=96, paged=cache, **sizes)


def _beside(tick: float, sizes: dict[str, Any], cleanup: ExitStack) -> Engine:
    from serving.engine_workers import start_server
    from tests.serving.engine_jobs import Faults, serve_tiny, start_tiny

    ranks = start_server(serve_tiny.__module__)
    cleanup.callback(ranks.close, 0.0)
    return start_tiny(ranks, Faults(tick=tick), **sizes)


if __name__ == "__main__":
    main()
