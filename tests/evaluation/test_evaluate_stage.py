"""Figures against the slowest correct computation, and the stage's artifact and errors."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Library
from tokenizers import models, normalizers

from mtk.artifacts import verify_lineage
from mtk.cli.main import main
from mtk.convert.open_model import OpenedModel, open_model
from mtk.errors import ArtifactError, ConfigError, DataError, GateError
from mtk.evaluation import lambada
from mtk.evaluation.documents import Document
from mtk.evaluation.scoring import Request, batches
from mtk.evaluation.text_ids import TextIds
from mtk.models.gpt import GPT
from mtk.tokenizers.huggingface import from_folder
from tests.convert.models import TEXT, VOCAB, llama, save_native
from tests.evaluation.stage import CONTEXT, brute_force, evaluate, items, log_prob, results
from tests.models.sizes import small_config


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_native(tmp_path_factory.mktemp("evaluate") / "model", llama())


@pytest.fixture(scope="module")
def opened(native: Path) -> OpenedModel:
    return open_model(native)


@pytest.mark.parametrize("overlap", [None, 1, 7, CONTEXT])
@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_perplexity_is_the_brute_force_one(
    overlap: int | None, batch_size: int | None, native: Path, opened: OpenedModel, tmp_path: Path
) -> None:
    data = tmp_path / "a.txt"
    data.write_text(TEXT, encoding="utf-8")
    artifact = evaluate(native, data, tmp_path, overlapping_eval=overlap, batch_size=batch_size)
    tokens = opened.tokenizer.encode(TEXT)
    total = brute_force(opened, tokens, overlap or CONTEXT)
    figures = results(artifact)["figures"]
    assert figures["total_nll"] == pytest.approx(total, rel=1e-6)
    assert figures["tokens"] == len(tokens) and figures["scored_tokens"] == len(tokens) - 1
    loss, original = total / (len(tokens) - 1), len(TEXT.strip().split(" "))
    ratio = (len(tokens) - 1) / (original - 1)
    assert figures["loss"] == pytest.approx(loss)
    assert figures["perplexity"] == pytest.approx(math.exp(min(20, loss)))
    assert figures["adjusted_perplexity"] == pytest.approx(math.exp(min(20, loss * ratio)))
    assert figures["bits_per_byte"] == pytest.approx(total / math.log(2) / len(TEXT.encode()))
    assert figures["original_tokens"] == original and figures["words"] == len(
        re.split(r"\s+", TEXT)
    )
    assert -math.fsum(i["log_likelihood"] for i in items(artifact)) == pytest.approx(total)


def test_documents_are_scored_apart(native: Path, opened: OpenedModel, tmp_path: Path) -> None:
    data = tmp_path / "a.jsonl"
    texts = [TEXT[:40], TEXT[40:]]
    data.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    artifact = evaluate(native, data, tmp_path)
    total = sum(brute_force(opened, opened.tokenizer.encode(t), CONTEXT) for t in texts)
    figures = results(artifact)["figures"]
    assert figures["total_nll"] == pytest.approx(total, rel=1e-6)
    assert figures["documents"] == 2 and figures["scored_tokens"] == figures["tokens"] - 2
    assert [item["document"] for item in items(artifact)][-1] == 1


PASSAGES = ["the quick brown fox jumps", "over the lazy dog dog", "a test numbers"]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_lambada_is_the_brute_force_one(
    strict: bool, batch_size: int | None, native: Path, opened: OpenedModel, tmp_path: Path
) -> None:
    data = tmp_path / "a.jsonl"
    data.write_text("".join(json.dumps({"text": t}) + "\n" for t in PASSAGES), encoding="utf-8")
    artifact = evaluate(
        native, data, tmp_path, task="LAMBADA", strict_lambada=strict, batch_size=batch_size
    )
    found = items(artifact)
    encode = opened.tokenizer.encode
    for passage, item in zip(PASSAGES, found, strict=True):
        if strict:
            word = passage.split()[-1]
            context, label = encode(passage[: passage.rindex(word)].strip()), encode(" " + word)
        else:
            context, label = encode(passage)[:-1], encode(passage)[-1:]
        expected = sum(
            log_prob(opened, context + label[:k], target) for k, target in enumerate(label)
        )
        assert item["log_likelihood"] == pytest.approx(expected, rel=1e-5)
        assert item["context_tokens"] == len(context) and item["label_tokens"] == len(label)
        assert item["label"] == opened.tokenizer.decode(label)
    figures = results(artifact)["figures"]
    assert figures["correct"] == sum(item["correct"] for item in found)
    assert figures["accuracy"] == figures["correct"] / 3 and figures["strict"] is strict


def test_a_last_word_is_tokenised_as_it_stands(tmp_path: Path) -> None:
    """Tokenizers of Llama-2's kind put a space before every text; alone the last word would
    begin with two. The harness cuts its label from the ids of the whole passage."""
    merges = [("▁", "a"), ("▁", "b"), ("a", "t"), ("c", "at"), ("▁", "cat")]
    pieces = ["<unk>", "</s>", *"▁abct", *("".join(pair) for pair in merges)]
    numbers = {piece: number for number, piece in enumerate(pieces)}
    library = Library(models.BPE(numbers, merges, unk_token="<unk>"))
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    text = TextIds(from_folder(tmp_path))
    assert text.alone(" cat") == [numbers["▁"], numbers["▁cat"]]
    request = lambada.passage_request(text, Document("a  b\ncat", "x:1"), strict=True)
    assert request.tokens == [numbers[piece] for piece in ("▁a", "▁", "▁b", "▁cat")]
    assert request.first == 3


def test_padding_is_an_id_that_the_model_has(
    native: Path, opened: OpenedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer may have got its end of document after the model was made."""
    beyond = property(lambda tokenizer: 10**6, lambda tokenizer, value: None)
    monkeypatch.setattr(type(opened.tokenizer), "eod", beyond, raising=False)
    data = tmp_path / "a.jsonl"
    data.write_text('{"text": "the quick brown fox"}\n{"text": "a test"}\n', encoding="utf-8")
    assert len(items(evaluate(native, data, tmp_path, task="LAMBADA"))) == 2


def test_lambada_counts_a_right_answer(native: Path, opened: OpenedModel, tmp_path: Path) -> None:
    """For some context the model's own most likely token survives tokenisation."""
    encode, decode = opened.tokenizer.encode, opened.tokenizer.decode
    for size in range(1, 20):
        context = encode(TEXT[:size])
        best = int(opened.model(torch.tensor([context]))[0, -1].argmax())
        text = decode([*context, best])
        if encode(text) == [*context, best] and text.strip() == text:
            break
    else:
        pytest.fail("no passage found")
    data = tmp_path / "a.jsonl"
    data.write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    figures = results(evaluate(native, data, tmp_path, task="LAMBADA"))["figures"]
    assert figures["correct"] == figures["total"] == 1


def test_the_artifact_and_skipping(native: Path, tmp_path: Path) -> None:
    data = tmp_path / "a.txt"
    data.write_text(TEXT, encoding="utf-8")
    first = evaluate(native, data, tmp_path)
    found = results(first)
    assert first.kind == "evaluation" and {i.role for i in first.inputs} == {"model", "data a.txt"}
    assert found["definitions"]["adjusted_perplexity"] and found["detokenizer"] == "none"
    assert found["data"][0]["file"] == "a.txt" and len(found["data"][0]["sha256"]) == 64
    assert set(verify_lineage(first).values()) == {"verified"}
    assert evaluate(native, data, tmp_path).timings == first.timings
    # The same bytes are another document elsewhere: a name decides how a file is read.
    other = data.rename(tmp_path / "b.txt")
    with pytest.raises(ArtifactError, match="--force"):
        evaluate(native, other, tmp_path)
    (tmp_path / "wiki").mkdir()
    marked = other.rename(tmp_path / "wiki" / "a.txt")
    with pytest.raises(ArtifactError, match="--force"):
        evaluate(native, marked, tmp_path, detokenizer="auto")
    data.write_text(TEXT + "more", encoding="utf-8")
    with pytest.raises(ArtifactError, match="--force"):
        evaluate(native, data, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "changes", "message"),
    [
        ("a.txt", "", {}, "is empty"),
        ("a.txt", "\n", {}, "is empty"),
        ("a.jsonl", '{"x": "y"}\n', {}, "no field 'text'"),
        ("a.jsonl", '{"text": "word"}\n', {"task": "LAMBADA", "strict_lambada": True}, "too short"),
        (
            "a.jsonl",
            '{"text": "a b' + "c" * 90 + '"}',
            {"task": "LAMBADA", "strict_lambada": True},
            "context of 24",
        ),
        ("lambada.txt", "a passage of many\n", {"task": "LAMBADA"}, "lambada.txt:1 is not JSON"),
        ("missing/a.txt", None, {}, "does not exist"),
    ],
)
def test_bad_data(
    name: str,
    content: str | None,
    changes: dict[str, Any],
    message: str,
    native: Path,
    tmp_path: Path,
) -> None:
    data = tmp_path / name
    if content is not None:
        data.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        evaluate(native, data, tmp_path, **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_length": 25}, "exceeds the 24 positions"),
        ({"overlapping_eval": 25}, "exceeds the context of 24"),
        ({"overlapping_eval": 9, "seq_length": 8}, "Nearest: 8"),
        ({"strict_lambada": True}, "belongs to --task LAMBADA"),
        ({"task": "LAMBADA", "overlapping_eval": 3}, "belongs to --task WIKITEXT103"),
        ({"task": "LAMBADA", "windows": "rolling"}, "belongs to --task WIKITEXT103"),
        ({"windows": "rolling", "overlapping_eval": 3}, "belongs to --windows megatron"),
        ({"task": "lambada"}, "Nearest: LAMBADA"),
        ({"task": "hellaswag"}, "lm-eval:hellaswag"),
        ({"task": "lm-eval:"}, "names no task"),
        ({"task": "lm-eval:a,b"}, "several tasks"),
        ({"task": "lm-eval:a", "detokenizer": "ptb"}, "belongs to --task WIKITEXT103"),
        ({"task": "lm-eval:a", "text_key": "x", "detokenizer": "auto"}, "belongs to --task WIKI"),
        ({"num_fewshot": 2}, "belongs to --task lm-eval:NAME"),
        ({"limit": 0}, "at least 1"),
        ({"valid_data": ()}, "names no file"),
        ({"nproc": 0}, "at least 1"),
        ({"distributed_timeout_minutes": 0}, "greater than 0"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str, native: Path, tmp_path: Path) -> None:
    data = tmp_path / "a.txt"
    data.write_text(TEXT, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        evaluate(native, data, tmp_path, **changes)


@pytest.mark.parametrize("task", ["WIKITEXT103", "LAMBADA"])
def test_a_loss_that_is_not_finite_is_refused(
    task: str, native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """exp(min(20, NaN)) is a number; it must not look like a result."""
    real = GPT.logits
    monkeypatch.setattr(GPT, "logits", lambda model, states: real(model, states) * math.nan)
    data = tmp_path / "a.jsonl"
    data.write_text(json.dumps({"text": "one two three"}), encoding="utf-8")
    with pytest.raises(GateError, match="not finite"):
        evaluate(native, data, tmp_path, task=task)
    assert not (tmp_path / "out").exists()


def test_a_model_without_tokenizer_cannot_be_scored(tmp_path: Path) -> None:
    model = save_native(tmp_path / "bare", llama(vocab_size=VOCAB), tokenizer=False)
    data = tmp_path / "a.txt"
    data.write_text(TEXT, encoding="utf-8")
    with pytest.raises(ArtifactError, match="has no tokenizer"):
        evaluate(model, data, tmp_path)


def test_command_line_json(
    native: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "wiki.txt"
    data.write_text(TEXT, encoding="utf-8")
    arguments = ["evaluate", "--load", str(native), "--task", "WIKITEXT103"]
    arguments += ["--valid-data", str(data), "--output", str(tmp_path / "out"), "--json"]
    assert main(arguments) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["event"] == "result" and last["kind"] == "evaluation"
    assert last["metrics"]["bits_per_byte"] > 0
    arguments[6] = str(tmp_path / "none.txt")
    assert main(arguments) == 3


def test_batches_respect_both_limits() -> None:
    requests = [Request(range(size + 1), 1) for size in (5, 1, 9, 3, 3, 8)]
    groups = list(batches(requests, 2, 16))
    assert sorted(index for group in groups for index in group) == list(range(6))
    for group in groups:
        longest = max(requests[i].inputs for i in group)
        assert len(group) <= 2 and (len(group) == 1 or len(group) * longest <= 16)


def test_a_long_passage_loses_its_beginning(
    native: Path, opened: OpenedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "a.jsonl"
    texts = [TEXT.strip(), "a test numbers"]
    data.write_text("".join(json.dumps({"text": t}) + "\r\n" for t in texts)[:-2], "utf-8")
    artifact = evaluate(native, data, tmp_path, task="LAMBADA", strict_lambada=True)
    long, short = items(artifact)
    encode = opened.tokenizer.encode
    word = texts[0].split()[-1]
    context, label = encode(texts[0][: texts[0].rindex(word)].strip()), encode(" " + word)
    kept = (context + label)[-CONTEXT - 1 :]
    first = len(kept) - len(label)
    expected = sum(log_prob(opened, kept[: first + k], target) for k, target in enumerate(label))
    assert long["log_likelihood"] == pytest.approx(expected, rel=1e-5)
    assert long["truncated"] == len(context) - first and short["truncated"] == 0
    assert results(artifact)["figures"]["truncated"] == 1


def test_bos_in_front(native: Path, opened: OpenedModel, tmp_path: Path) -> None:
    """Megatron's windows with BOS: the first token is predicted too, BOS itself never."""
    data = tmp_path / "a.txt"
    data.write_text(TEXT, encoding="utf-8")
    artifact = evaluate(native, data, tmp_path, prepend_bos="always")
    bos, tokens = opened.tokenizer.bos, opened.tokenizer.encode(TEXT)
    assert bos is not None
    total = brute_force(opened, [bos, *tokens], CONTEXT)
    figures = results(artifact)["figures"]
    assert figures["total_nll"] == pytest.approx(total, rel=1e-6)
    assert figures["scored_tokens"] == figures["tokens"] == len(tokens)
    assert figures["token_ratio"] == len(tokens) / len(TEXT.strip().split(" "))
    assert results(artifact)["prepend_bos"] is True


def test_rolling_windows_have_all_the_context_the_model_takes(
    opened: OpenedModel, native: Path, tmp_path: Path
) -> None:
    data = tmp_path / "a.jsonl"
    texts = [TEXT, "a", "the quick brown"]
    data.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    artifact = evaluate(native, data, tmp_path, windows="rolling", batch_tokens=50)
    total = 0.0
    for text in texts:
        ids = [opened.tokenizer.eod, *opened.tokenizer.encode(text)]
        for target in range(1, len(ids)):
            window = (target - 1) // CONTEXT
            end = min((window + 1) * CONTEXT, len(ids) - 1)
            total -= log_prob(opened, ids[max(0, end - CONTEXT) : target], ids[target])
    figures = results(artifact)["figures"]
    assert figures["total_nll"] == pytest.approx(total, rel=1e-6)
    assert figures["scored_tokens"] == figures["tokens"]


def test_a_model_that_predicts_no_next_token_is_refused(tmp_path: Path) -> None:
    config = small_config(family="bert", vocab_size=VOCAB)
    model = save_native(tmp_path / "bert", config)
    data = tmp_path / "a.txt"
    data.write_text(TEXT, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"predicts the next token; .* is a BERT"):
        evaluate(model, data, tmp_path)
