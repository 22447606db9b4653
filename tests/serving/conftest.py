"""An engine on a tiny random model, its application, and a real server on a free port."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from flask import Flask
from flask.testing import FlaskClient

from mtk.config.serve import CacheConfig
from serving.app import create_app
from serving.server import HttpServer, bind
from serving.settings import ServerSettings
from serving.torch_engine import TorchEngine
from tests.serving.models import ByteTokenizer, tiny_model

CONTEXT = 96
SETTINGS = ServerSettings(model="tiny", lineage={"kind": "checkpoint", "digest": "d"})


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def make_engine() -> Iterator[Callable[..., TorchEngine]]:
    made: list[TorchEngine] = []

    def make(**values: object) -> TorchEngine:
        options: dict[str, object] = {"context": CONTEXT, "report": lambda line: None, **values}
        options.setdefault("paged", CacheConfig())
        made.append(TorchEngine(tiny_model(), ByteTokenizer(), **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for engine in made:
        engine.close(timeout=10)
        assert not engine.thread_alive


@pytest.fixture(scope="module")
def client() -> Iterator[FlaskClient]:
    """One engine for all tests of a module that leave it as it was."""
    engine = TorchEngine(
        tiny_model(),
        ByteTokenizer(),
        context=CONTEXT,
        paged=CacheConfig(),
        report=lambda line: None,
    )
    yield create_app(engine, SETTINGS).test_client()
    engine.close(timeout=10)


@pytest.fixture
def serve() -> Iterator[Callable[[Flask], str]]:
    """Puts an application behind waitress on a free port; returns the URL."""
    running: list[tuple[HttpServer, threading.Thread]] = []

    def start(app: Flask, **values: float) -> str:
        server = HttpServer(app, bind("127.0.0.1", 0), **values)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        running.append((server, thread))
        return server.url

    yield start
    for server, thread in running:
        server.stop()
        server.stop()
        thread.join(20)
        assert not thread.is_alive()


def settings(**values: object) -> ServerSettings:
    return replace(SETTINGS, **values)  # type: ignore[arg-type]
