"""The clients that people use: OpenAI's own, and lm-evaluation-harness."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mtk.tokenizers.byte_level import byte_of_character
from serving.app import create_app
from serving.chat_prompt import open_chat
from serving.torch_engine import TorchEngine
from tests.serving.conftest import settings
from tests.serving.models import EOD, ByteTokenizer, greedy_without_cache, tiny_model

MakeEngine = Callable[..., TorchEngine]
Serve = Callable[..., str]


@pytest.fixture
def url(make_engine: MakeEngine, serve: Serve) -> str:
    chat = open_chat("plain", ByteTokenizer(), "tiny")
    keys = frozenset({"s3cret"})
    return serve(create_app(make_engine(), settings(chat=chat, api_keys=keys)))


@pytest.fixture
def openai(url: str) -> Any:
    library = pytest.importorskip("openai")
    with library.OpenAI(base_url=f"{url}/v1", api_key="s3cret", max_retries=0) as client:
        yield client


def greedy(prompt: str, count: int) -> str:
    return ByteTokenizer().decode(greedy_without_cache(tiny_model(), prompt.encode(), count))


def test_openai_completions(openai: Any) -> None:
    asked = {"model": "tiny", "prompt": "Hello", "max_tokens": 8, "temperature": 0}
    answer = openai.completions.create(**asked, logprobs=2, n=2, extra_body={"top_k": 5})
    assert [choice.text for choice in answer.choices] == [greedy("Hello", 8)] * 2
    assert answer.usage.total_tokens == 5 + 16
    assert len(answer.choices[0].logprobs.token_logprobs) == 8
    parts = list(openai.completions.create(**asked, stream=True))
    assert "".join(part.choices[0].text for part in parts) == greedy("Hello", 8)


def test_openai_chat(openai: Any) -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
    asked = {"model": "tiny", "messages": messages, "max_completion_tokens": 8, "seed": 4}
    answer = openai.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    said = answer.choices[0].message.content
    assert answer.choices[0].message.role == "assistant"
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 3
    with openai.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ) as stream:
        parts = list(stream)
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == said
    assert parts[-1].usage == answer.usage


def test_openai_parses_answers_by_schema(openai: Any) -> None:
    pytest.importorskip("llguidance")
    from pydantic import BaseModel

    class Verdict(BaseModel):
        good: bool

    messages = [{"role": "user", "content": "Hi"}]
    answer = openai.chat.completions.parse(
        model="tiny", messages=messages, response_format=Verdict, max_tokens=70, seed=3
    )
    assert isinstance(answer.choices[0].message.parsed, Verdict)
    assert isinstance(json.loads(answer.choices[0].message.content)["good"], bool)


def test_openai_models(openai: Any) -> None:
    assert [model.id for model in openai.models.list()] == ["tiny"]
    assert openai.models.retrieve("tiny").owned_by == "mtk"


def test_openai_errors_are_those_of_its_library(openai: Any, url: str) -> None:
    import openai as library

    def create(client: Any, **changes: Any) -> Any:
        return client.completions.create(**{"model": "tiny", "prompt": "a", **changes})

    with pytest.raises(library.BadRequestError) as refused:
        create(openai, max_tokens=10**6)
    assert refused.value.param == "max_tokens" and "maximum context" in str(refused.value)
    with pytest.raises(library.NotFoundError):
        create(openai, model="gpt-9")
    stranger = openai.with_options(api_key="wrong")
    with pytest.raises(library.AuthenticationError):
        create(stranger)


def test_openai_tells_of_a_full_server(make_engine: MakeEngine, serve: Serve) -> None:
    library = pytest.importorskip("openai")
    app = create_app(make_engine(), settings(max_concurrency=1))
    url = serve(app)
    release = app.extensions["mtk"]._take_slot()
    with library.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        with pytest.raises(library.RateLimitError) as full:
            client.completions.create(model="tiny", prompt="a")
        assert int(full.value.response.headers["retry-after"]) >= 1
        release()
        client.completions.create(model="tiny", prompt="a")


def tokenizer_folder(folder: Path) -> Path:
    """The tests' tokenizer as one of transformers: 256 bytes and the end of a document."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    library = Tokenizer(models.BPE(byte_of_character(), []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    folder.mkdir()
    library.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def harness(url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    pytest.importorskip("tenacity")
    models = pytest.importorskip("lm_eval.models.openai_completions")
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret")
    return models.LocalCompletionsAPI(
        model="tiny",
        base_url=f"{url}/v1/completions",
        tokenizer=str(tokenizer_folder(tmp_path / "tokenizer")),
        max_length=96,
        max_gen_toks=16,
        batch_size=2,
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lm_evaluation_harness(harness: Any) -> None:
    """Continuations as greedy decoding gives them, log-likelihoods as the model does."""
    from lm_eval.api.instance import Instance

    options = {"until": ["\n\n"], "max_gen_toks": 9}
    asked = [Instance("generate_until", {}, (text, options), 0) for text in ("Hello", "Who")]
    assert harness.generate_until(asked) == [greedy("Hello", 9), greedy("Who", 9)]
    pairs = [("Hello", " world"), ("Hello", greedy("Hello", 1)), ("", "abc"), ("x" * 80, "yz")]
    scored = harness.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    for (context, text), (value, is_greedy) in zip(pairs, scored, strict=True):
        expected, best = likelihood(context.encode() or b"", text.encode())
        assert value == pytest.approx(expected, abs=1e-3) and is_greedy == best


@torch.inference_mode()
def likelihood(context: bytes, text: bytes) -> tuple[float, bool]:
    before = list(context) or [EOD]
    ids = torch.tensor([[*before, *text]])
    scores = tiny_model()(ids)[0].log_softmax(-1)[len(before) - 1 : -1]
    chosen = torch.tensor(list(text))
    return float(scores.gather(1, chosen[:, None]).sum()), bool((scores.argmax(-1) == chosen).all())
