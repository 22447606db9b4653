"""Text from Python: what can be asked for, and what is refused instead of passed over."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from mtk.convert.open_model import open_model
from mtk.errors import ConfigError, ServingError
from serving.generate_text import generate_text
from tests.convert.models import TEXT, VOCAB, llama, save_native
from tests.models.sizes import small_config


def test_text_from_python(tmp_path: Path) -> None:
    folder = save_native(tmp_path / "native", llama())
    prompts = [TEXT[:9], TEXT[4:19]]
    greedy = generate_text(folder, prompts, max_new_tokens=6, temperature=0)
    assert len(greedy) == 2 and generate_text(folder, prompts, max_new_tokens=6, top_k=1) == greedy
    sampled = {"max_new_tokens": 6, "top_p": 0.9, "top_p_decay": 0.9, "top_p_bound": 0.2}
    assert generate_text(folder, prompts, seed=1, **sampled) == generate_text(
        folder, prompts, seed=1, **sampled
    )
    beams = generate_text(folder, prompts, max_new_tokens=6, num_beams=3, length_penalty=0.7)
    assert len(beams) == 2 and all(isinstance(text, str) for text in beams)
    begun = generate_text(folder, prompts, max_new_tokens=6, temperature=0, add_BOS=True)
    assert begun != greedy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": "one text"}, "give a list of texts"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0: must be at least 1"),
        ({"num_beams": 0}, "num_beams = 0: must be at least 1"),
        ({"num_beams": 2, "top_k": 4}, "top_k = 4: a beam search draws nothing"),
        ({"num_beams": 2, "length_penalty": math.nan}, "length_penalty = nan: must lie in"),
        ({"length_penalty": 2.0}, "needs num_beams greater than 1"),
        ({"max_new_tokens": 30}, "maximum context length is 24"),
        ({"family": "bert"}, "predicts the next token; .* is a BERT"),
        ({"family": "t5", "add_BOS": True}, "add_BOS: .* model with an encoder has not"),
        ({"family": "t5", "max_new_tokens": 30}, "decoder writes at most 24 tokens"),
    ],
)
def test_text_that_cannot_be_made(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    family = changes.pop("family", None)
    sizes: dict[str, Any] = {"family": family, "vocab_size": VOCAB, "decoder_seq_length": 24}
    if family == "bert":
        del sizes["decoder_seq_length"]
    folder = save_native(tmp_path / "native", small_config(**sizes) if family else llama())
    with pytest.raises((ConfigError, ServingError), match=message):
        generate_text(folder, **({"prompts": ["a text"], "max_new_tokens": 2} | changes))


def test_no_last_position(tmp_path: Path) -> None:
    """ALiBi goes on beyond the length that the model was trained at."""
    folder = save_native(tmp_path / "native", llama(position_embedding_type="alibi"))
    [long] = generate_text(folder, ["a text"], max_new_tokens=40, temperature=0)
    [short] = generate_text(folder, ["a text"], max_new_tokens=9, temperature=0)
    assert long.startswith(short) and len(long) > len(short)


def test_prompts_begin_as_in_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_model(save_native(tmp_path / "native", llama()))
    with_bos, bare = (
        generate_text(opened, ["a text"], temperature=0, max_new_tokens=8, add_BOS=bos)
        for bos in (True, False)
    )
    assert opened.tokenizer.bos == opened.tokenizer.eod and with_bos != bare
    monkeypatch.setattr(type(opened.tokenizer), "bos_first", True)
    assert generate_text(opened, ["a text"], temperature=0, max_new_tokens=8) == with_bos
