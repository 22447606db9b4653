"""``mtk serve`` on a T5's directory: limits of both sides, OpenAI's client, every dialect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mtk.config import make
from mtk.config.serve import ServeConfig
from mtk.errors import ConfigError
from mtk.log import Reporter
from serving.app import create_app
from serving.generate_text import generate_text
from serving.torch_engine import TorchEngine
from stages.serve import open_engine, server_settings
from tests.convert.models import save_native
from tests.models.sizes import small_config
from tests.serving.t5_directory import EOS, PAD, V11, t5_directory
from tests.serving.wire import call

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPTS = ["translate English to German: the quick brown fox", "the <extra_id_0> dog"]
Serve = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return t5_directory(tmp_path_factory.mktemp("t5") / "tiny", V11)


def config(folder: Path, **limits: Any) -> ServeConfig:
    return make(ServeConfig, load=str(folder), device="cpu", **limits)


def opened(folder: Path, **limits: Any) -> TorchEngine:
    found = open_engine(config(folder, **limits), Reporter(quiet=True)).engine
    assert isinstance(found, TorchEngine)
    return found


@pytest.fixture
def url(folder: Path, serve: Serve) -> Iterator[str]:
    asked = config(folder, max_seq_length=60)
    found = open_engine(asked, Reporter(quiet=True))
    settings = server_settings(asked, lineage=None, keys=frozenset(), chat=None, log=lambda _: None)
    yield serve(create_app(found.engine, settings))
    found.engine.close(10)


def test_openais_client(url: str, folder: Path) -> None:
    library = pytest.importorskip("openai")
    expected = generate_text(folder, PROMPTS, max_new_tokens=12, temperature=0)
    assert len(set(expected)) == 2
    asked = {"model": "tiny", "prompt": PROMPTS, "max_tokens": 12, "temperature": 0}
    with library.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        answer = client.completions.create(**asked, logprobs=2)
        assert [choice.text for choice in answer.choices] == expected
        parts: dict[int, str] = {0: "", 1: ""}
        for part in client.completions.create(**asked, stream=True):
            parts[part.choices[0].index] += part.choices[0].text
        assert list(parts.values()) == expected
        with pytest.raises(library.BadRequestError) as refused:
            client.completions.create(**asked, echo=True)
        assert refused.value.code == "not_for_encoder_decoder" and refused.value.param == "echo"


def test_megatrons_requests(url: str, folder: Path) -> None:
    [expected] = generate_text(folder, PROMPTS[:1], max_new_tokens=9, num_beams=3)
    body = {"prompts": PROMPTS[:1], "tokens_to_generate": 9, "beam_width": 3}
    status, answer, _ = call(url, "PUT", "/api", body)
    assert status == 200 and answer["text"][0] == expected and len(answer["scores"]) == 3
    _, told, _ = call(url, "POST", "/tokenize", {"prompt": PROMPTS[0]})
    assert told["tokens"][-1] == EOS and told["max_model_len"] == 60
    status, _, _ = call(url, "GET", "/readyz", None)
    assert status == 200


def test_limits_of_both_sides(folder: Path) -> None:
    """As trained, or --max-seq-length for each; relative positions have no last one."""
    for limits, sides in (({}, (512, 128)), ({"max_seq_length": 700}, (700, 700))):
        engine = opened(folder, **limits)
        assert engine.encoder is not None
        assert (engine.encoder.context, engine.context) == sides
        assert engine.encoder.start == PAD
        engine.close(10)


def test_learned_positions_are_a_limit(tmp_path: Path) -> None:
    sizes = {"family": "t5", "vocab_size": 300, "decoder_seq_length": 16, "seq_length": 40}
    native = save_native(tmp_path / "native", small_config(**sizes))
    engine = opened(native)
    # Its tokenizer has BOS.
    assert engine.encoder is not None and engine.encoder.start == engine.tokenizer.bos
    assert (engine.encoder.context, engine.context) == (40, 16)
    engine.close(10)
    with pytest.raises(ConfigError, match="40 positions"):
        opened(native, max_seq_length=41)
    with pytest.raises(ConfigError, match="--kv-cache dense"):
        opened(native, kv_cache="paged")


def test_a_bert_is_refused(tmp_path: Path) -> None:
    native = save_native(tmp_path / "bert", small_config(family="bert", vocab_size=300))
    with pytest.raises(ConfigError, match=r"predicts the next token; .* is a BERT"):
        opened(native)
