"""What is measured is decoding as it is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mtk.config.serve import CacheConfig
from mtk.errors import ConfigError
from serving.decode_speed import WARM_UP, measure_decode
from serving.paged.batch import PagedBatch
from tests.docs.shell_commands import fenced
from tests.serving.models import LLAMA_LIKE, MAMBA, tiny_model


def test_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    real = PagedBatch.step

    def counted(batch: PagedBatch) -> Any:
        found = real(batch)
        steps.append(len(found))
        return found

    monkeypatch.setattr(PagedBatch, "step", counted)
    model = tiny_model(**LLAMA_LIKE)
    found = measure_decode(model, 3, 10, 40)
    # The first token of each is that of the prompt; every timed step brings one to all.
    assert len(found.step_seconds) == 40 - 1 - WARM_UP
    assert steps[-len(found.step_seconds) :] == [3] * len(found.step_seconds)
    assert found.tokens_per_second == pytest.approx(3 * 31 / sum(found.step_seconds))
    # Two layers of two groups of 8 channels, keys and values, in fp32.
    assert found.cache_token_bytes == 2 * 2 * 2 * 8 * 4
    embedding = model.embedding.tokens.weight.nbytes
    assert found.weight_bytes == sum(p.nbytes for p in model.parameters()) - embedding


@pytest.mark.parametrize(
    ("model", "new", "options", "words"),
    [
        (MAMBA, 40, None, "paged cache"),
        ({}, WARM_UP, None, "new tokens"),
        ({}, 40, CacheConfig(kv_cache_tokens=64), "all sequences"),
    ],
)
def test_what_cannot_be_measured(model: dict[str, Any], new: int, options: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        measure_decode(tiny_model(**model), 3, 10, new, options=options)


@pytest.mark.parametrize(("example", "words"), [(0, "MiB of weights"), (1, "tokens/s")])
def test_the_examples_of_the_page_run(
    example: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path(__file__).parents[3] / "docs" / "engine.md"
    codes = [text for language, text in fenced(page) if language == "python"]
    assert len(codes) == 2
    exec(codes[example], {})
    assert words in capsys.readouterr().out
