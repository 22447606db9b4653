"""``mtk serve --engine tensorrt-llm``: what it loads, what it refuses, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from mtk.cli.main import main
from mtk.config import make
from mtk.config.serve import ServeConfig
from mtk.convert.open_model import open_model
from mtk.convert.source import find_source
from mtk.quantization.dialects import dialect_of
from mtk.quantization.formats import format_of
from mtk.quantization.quantize_model import read_original, write_quantized
from serving.client import Client
from serving.client_stream import Answer
from serving.tensorrt_llm_open import open_tensorrt
from stages.convert import run as convert
from tests.convert.models import convert_config, llama, quiet, save_native
from tests.serving import tensorrt_llm_stand_in as package
from tests.serving.wire import eventually


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model natively, for Hugging Face, and quantized in both dialects."""
    folder = tmp_path_factory.mktemp("models")
    native = save_native(folder / "native", llama(seq_length=64, max_position_embeddings=64))
    found = {"native": native, "hf": convert(convert_config(native, folder / "hf"), quiet()).path}
    original = read_original(find_source(found["hf"]), None)
    for name in ("modelopt", "compressed-tensors"):
        write_quantized(original, folder / name, dialect_of(name, "int8"), format_of("int8"), 2**30)
        found[name] = folder / name
    return found


def serve(*options: Any) -> int:
    return main(["serve", "--engine", "tensorrt-llm", "--port", "0", *map(str, options)])


def test_without_the_package(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert serve("--load", models["hf"]) == 2
    err = capsys.readouterr().err
    assert "not installed" in err and "pip install tensorrt-llm" in err and "--engine torch" in err


def test_a_package_that_cannot_be_imported(
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "tensorrt_llm.py").write_text("raise ImportError('libnvinfer.so: not found')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert serve("--load", models["hf"]) == 2
    assert "cannot be imported (libnvinfer.so" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "words"),
    [("native", "mtk convert --load"), ("compressed-tensors", "mtk quantize --dialect modelopt")],
)
def test_what_it_does_not_load(
    models: dict[str, Path], capsys: pytest.CaptureFixture[str], kind: str, words: str
) -> None:
    with package.installed():
        assert serve("--load", models[kind]) == 4
    assert words in capsys.readouterr().err


def test_without_a_tokenizer(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in models["hf"].iterdir():
        if "tokenizer" not in path.name and path.name != "artifact.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with package.installed():
        assert serve("--load", tmp_path) == 4
    assert "no tokenizer.json" in capsys.readouterr().err


def test_a_model_with_an_encoder(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in models["hf"].iterdir():
        if path.name != "artifact.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"is_encoder_decoder": True}))
    with package.installed():
        assert serve("--load", tmp_path) == 4
    assert "has an encoder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "cpu"], "needs a GPU"),
        (["--kv-cache-fraction", "1.5"], "between 0 and 1"),
        (["--tensor-parallel-size", "0"], "at least 1"),
        (["--max-seq-length", "65"], "64 positions"),
        (["--engine", "torch", "--tensor-parallel-size", "2"], "no TensorRT-LLM options"),
    ],
)
def test_bad_options(
    models: dict[str, Path], capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    with package.installed():
        assert serve("--load", models["hf"], *options) == 2
    assert words in capsys.readouterr().err


def test_modelopt_directories_are_loaded(models: dict[str, Path]) -> None:
    config = make(ServeConfig, load=str(models["modelopt"]), engine="tensorrt-llm")
    with package.installed():
        engine = open_tensorrt(config, lambda line: None).engine
    try:
        assert engine.probe(20.0).ready
        assert engine.vocab_size == open_model(models["hf"]).config.vocab_size
    finally:
        engine.close(timeout=10)


def test_it_serves_and_drains(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ready, seen = tmp_path / "ready", list[Any]()

    def visit() -> None:
        try:
            assert eventually(ready.exists, 60)
            client = Client(ready.read_text().strip())
            seen.append(client.complete("the quick", max_tokens=5, temperature=0))
            seen.append(client.request("GET", "/v1/lineage")["kind"])
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=visit)
    with package.installed():
        thread.start()
        code = serve("--load", models["hf"], "--ready-file", ready)
        thread.join()
    assert code == 0, capsys.readouterr().err
    answer, kind = seen
    assert isinstance(answer, Answer) and answer.usage["completion_tokens"] == 5
    assert kind == "hf_model"
