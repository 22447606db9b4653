"""A server whose steps bring several tokens at once sends them one by one, in order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mtk.config import make
from mtk.config.serve import CacheConfig
from mtk.errors import ConfigError
from mtk.models.gpt import GPT
from serving.app import create_app
from serving.paged.runner import Runner
from serving.settings import ServerSettings
from serving.torch_engine import TorchEngine
from tests.serving.models import ByteTokenizer, tiny_model

ALPHABET = "abcdefghijklmnop"


def spelling() -> GPT:
    """After each letter it says the next one, after the last the first."""
    model = tiny_model(
        position_embedding_type="none",
        normalization="RMSNorm",
        untie_embeddings_and_output_weights=True,
    )
    ids = torch.tensor(list(ALPHABET.encode()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("layers"):
                parameter.zero_()
        letters = model.embedding.tokens.weight[ids]  # type: ignore[union-attr]
        model.output_weight.zero_()
        model.output_weight[ids.roll(-1)] = torch.nn.functional.normalize(letters, dim=-1)
    return model


@pytest.fixture(params=[False, True], ids=["in turn", "ahead"])
def engine(request: pytest.FixtureRequest) -> Iterator[TorchEngine]:
    made = TorchEngine(
        spelling(), ByteTokenizer(), context=96, paged=CacheConfig(), ahead=request.param,
        report=lambda line: None,
    )  # fmt: skip
    yield made
    made.close(10)


def events(answer: Any) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_streams_and_figures(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, real = [0], Runner.decode

    def counted(runner: Runner, rows: Any) -> Any:
        steps[0] += 1
        return real(runner, rows)

    monkeypatch.setattr(Runner, "decode", counted)
    client = create_app(engine, ServerSettings(model="demo")).test_client()
    asked = {"prompt": ALPHABET + "ab", "max_tokens": 70, "temperature": 0, "logprobs": 1,
             "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
    found = events(client.post("/v1/completions", json=asked))
    usage = found.pop()["usage"]
    assert usage["completion_tokens"] == 70
    choices = [event["choices"][0] for event in found]
    texts = [choice["text"] for choice in choices if choice["text"]]
    assert texts == list((ALPHABET * 6)[2:72])
    assert all(len(c["logprobs"]["tokens"]) == 1 for c in choices if c["text"])
    assert [c["finish_reason"] for c in choices if c["finish_reason"]] == ["length"]
    cache = engine.stats().cache
    assert cache.drafted >= cache.accepted > 40 and steps[0] <= 70 - cache.accepted
    figures = client.get("/metrics").text
    assert f"mtk_draft_tokens_total {cache.drafted}.0" in figures
    assert f"mtk_draft_accepted_total {cache.accepted}.0" in figures
    assert "mtk_generated_tokens_total 70.0" in figures


def test_a_stop_string_inside_of_a_guess(engine: TorchEngine) -> None:
    client = create_app(engine, ServerSettings(model="demo")).test_client()
    asked = {"prompt": ALPHABET * 2, "max_tokens": 60, "temperature": 0, "stop": ["pabcdefg"]}
    answer = client.post("/v1/completions", json=asked).json
    assert answer["choices"][0]["text"] == ALPHABET[:-1]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == len(ALPHABET) + 7
    assert engine.stats().cache.drafted > 0 and engine.stats().cache.blocks_used == 0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"draft_tokens": 0}, "draft_tokens"),
        ({"lookup_min_ngram": 0}, "lookup_min_ngram"),
        ({"lookup_ngram": 1}, "Nearest: 2"),
        ({"speculation": "magic"}, "lookup"),
    ],
)
def test_bad_options(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make(CacheConfig, **values)
