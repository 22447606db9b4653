"""Supervised finetuning: packing, samples, layouts, resuming, what is left behind."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtk.checkpoint import complete_steps
from mtk.convert.open_model import open_model
from mtk.data.chat_corpus import ChatReader
from mtk.data.chat_dataset import ChatDataset
from mtk.data.chat_template import choose_template
from mtk.data.chat_templates import BUILT_IN
from mtk.data.epochs import ShuffledEpochs
from mtk.data.first_fit import first_fit
from mtk.errors import CheckpointError, ConfigError, DataError
from mtk.log import Reporter
from mtk.session import Session
from stages.finetune import run
from tests.convert.models import gpt2_config, llama, save_native, small_tokenizer
from tests.finetune.runs import (
    LAYOUTS,
    QUIET,
    assert_close,
    layouts,
    options,
    train,
    weight_files,
    write_lines,
)

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "it's", "a", "test"]


def talks(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations of uneven lengths: an answer repeats its question."""
    chance = random.Random(seed)
    found = []
    for _ in range(count):
        messages = []
        for _ in range(chance.randint(1, 2)):
            words = " ".join(chance.choices(WORDS, k=chance.randint(1, 3)))
            messages.append({"role": "user", "content": words})
            messages.append({"role": "assistant", "content": words})
        found.append({"messages": messages})
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    kinds = {"gpt2": gpt2_config, "llama": llama}
    for name, kind in kinds.items():
        model = kind(seq_length=48, max_position_embeddings=64, num_layers=2)
        save_native(folder / name, model)
    save_native(folder / "bare", gpt2_config(seq_length=48), tokenizer=False)
    save_native(folder / "narrow", gpt2_config(seq_length=48, vocab_size=256))
    # Without positions there are none to restart.
    save_native(folder / "nope", llama(seq_length=48, position_embedding_type="none"))
    write_lines(folder / "talk.jsonl", talks(30))
    write_lines(folder / "held.jsonl", talks(7, seed=1))
    return folder


def config(home: Path, save: Path, base: str = "llama", **changes: Any) -> Any:
    own = {
        "train_data": [str(home / "talk.jsonl")],
        "valid_data": [str(home / "held.jsonl")],
        "chat_template": "plain",
    }
    return options("sft", home / base, save, **{**own, **changes})


def corpus(home: Path, length: int = 48) -> tuple[Any, ChatReader]:
    tokenizer = small_tokenizer()
    reader = ChatReader(choose_template("plain", tokenizer, ""), tokenizer, length)
    return reader.corpus([home / "talk.jsonl"], ["digest"], home / "cache"), reader


def test_first_fit_is_the_plain_algorithm() -> None:
    chance = random.Random(3)
    sizes = [chance.randint(1, 20) for _ in range(300)]
    bins: list[list[int]] = []
    room: list[int] = []
    for item, size in enumerate(sizes):
        chosen = next((b for b, left in enumerate(room) if left >= size), len(bins))
        if chosen == len(bins):
            bins.append([])
            room.append(20)
        bins[chosen].append(item)
        room[chosen] -= size
    assert first_fit(sizes, 20) == bins
    assert first_fit([], 5) == [] and first_fit([5], 5) == [[0]]
    with pytest.raises(ValueError, match="does not fit"):
        first_fit([3, 6], 5)


def test_packed_samples_hold_every_conversation_once(home: Path) -> None:
    found, _ = corpus(home)
    packed = ChatDataset(found, 48, 0, packing=True)
    padded = ChatDataset(found, 48, 0, packing=False)
    assert len(padded) == 30 > len(packed)
    alone = {}
    for k in range(30):
        sample = padded[k]
        size = int(found.starts_C[k + 1] - found.starts_C[k]) - 1
        assert "documents" not in sample and not sample["loss_mask"][size:].any()
        alone[k] = tuple(sample[name][:size].tolist() for name in ("tokens", "labels", "loss_mask"))
    seen = []
    for k, items in enumerate(packed.samples):
        sample = packed[k]
        for number, index in enumerate(items):
            own = sample["documents"] == number
            assert sample["positions"][own].tolist() == list(range(own.sum()))
            parts = tuple(sample[n][own].tolist() for n in ("tokens", "labels", "loss_mask"))
            assert parts == alone[index]
            seen.append(index)
        assert not sample["loss_mask"][sample["documents"] == len(items)].any()
    assert sorted(seen) == list(range(30))


def test_unmasked_labels_decode_to_the_answers(home: Path) -> None:
    found, reader = corpus(home, 400)
    tokenizer, end = reader.tokenizer, reader.tokenizer.eod
    for k, talk in enumerate(talks(30)):
        ids, counted = found.conversation(k)
        said = tokenizer.decode([int(t) for t, c in zip(ids, counted, strict=True) if c])
        answers = [m["content"] for m in talk["messages"] if m["role"] == "assistant"]
        assert said == "".join(f" {answer}{tokenizer.piece(end)}" for answer in answers)


def test_long_conversations_are_cut_and_counted(home: Path) -> None:
    lines = [{"prompt": "fox " * a, "response": "dog " * b} for a, b in ((1, 1), (1, 80), (80, 1))]
    path = write_lines(home / "long.jsonl", lines)
    reader = corpus(home, 47)[1]
    found = reader.corpus([path], ["long"], home / "cache")
    assert (len(found), found.cut, found.lost) == (2, 2, 1)
    assert "2 conversations cut" in found.summary and "no answer was left" in found.summary
    with pytest.raises(DataError, match=r"no token is left.*--seq-length"):
        hopeless = write_lines(home / "hopeless.jsonl", lines[2:])
        reader.corpus([hopeless], ["hopeless"], home / "cache")


def test_epochs_show_every_sample_and_blank_what_fills_up(home: Path) -> None:
    found, _ = corpus(home)
    dataset = ChatDataset(found, 48, 0, packing=True)
    n = len(dataset)
    ordered = ShuffledEpochs(dataset, 2 * n, seed=5)
    for epoch in range(2):
        assert sorted(ordered.place(epoch * n + k) for k in range(n)) == list(range(n))
    first, second = ([ordered.place(e * n + k) for k in range(n)] for e in range(2))
    assert first != second
    assert ordered[2 * n - 1]["loss_mask"].any() and not ordered[2 * n]["loss_mask"].any()
    longer = ShuffledEpochs(dataset, 9 * n, seed=5)
    assert [longer.place(k) for k in range(2 * n)] == first + second


@pytest.fixture(scope="module")
def one(home: Path) -> list[dict[str, Any]]:
    return train(config(home, home / "one"))


@pytest.mark.parametrize("name", layouts("tp2-sp", "pp2", "cp2", "dp2-full"))
def test_every_figure_is_that_of_one_process(
    home: Path, one: list[dict[str, Any]], name: str
) -> None:
    other = train(config(home, home / name, nproc=2, **LAYOUTS[name]))
    assert_close(other, one, 1e-5)
    tokens = torch.arange(32).view(2, 16) * 7
    models = [open_model(home / which).model for which in ("one", name)]
    torch.testing.assert_close(models[0](tokens), models[1](tokens), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("base", ["gpt2", "nope"])
def test_packing_changes_no_answer(home: Path, tmp_path: Path, base: str) -> None:
    """All conversations in one step, packed or not: the same loss and norm."""
    steps = []
    for packing in (True, False):
        wanted = config(
            home,
            tmp_path / str(packing),
            base,
            packing=packing,
            train_iters=1,
            global_batch_size=len(ChatDataset(corpus(home)[0], 48, 0, packing=packing)),
        )
        steps.append(train(wanted))
    assert_close([steps[0][0] | {"samples": 0, "tokens": 0}], [
        steps[1][0] | {"samples": 0, "tokens": 0}], 1e-5)  # fmt: skip


def test_learns_to_answer_and_keeps_what_it_needs(home: Path, tmp_path: Path) -> None:
    before = train(config(home, tmp_path / "before", train_iters=1, lr=1e-30))[-1]["loss"]
    wanted = config(home, tmp_path / "run", train_iters=None, epochs=12, keep_checkpoints=2)
    artifact = run(wanted, QUIET)
    best = json.loads((tmp_path / "run" / "best.json").read_text())
    assert best["loss"] < 0.6 * before
    assert best["step"] in complete_steps(tmp_path / "run")
    opened = open_model(artifact.folder)
    assert b"endgeneration" in opened.tokenizer.extra["chat_template.jinja"]
    assert opened.tokenizer.fingerprint == small_tokenizer().fingerprint
    assert choose_template(None, opened.tokenizer, "").source.startswith("{%- for")
    roles = [record.role for record in artifact.inputs]
    assert roles == ["training data", "training data", "initial model"]


def test_resumes_bit_for_bit_in_the_middle_of_an_epoch(home: Path, tmp_path: Path) -> None:
    changes = {"train_iters": 6, "save_interval": 2, "keep_checkpoints": 0, "hidden_dropout": 0.1}
    for name in ("straight", "stopped"):
        run(config(home, tmp_path / name, "gpt2", **changes), QUIET)
    for step in (4, 6):
        shutil.rmtree(tmp_path / "stopped" / f"step_{step:08}")
    run(config(home, tmp_path / "stopped", "gpt2", **changes), QUIET)
    assert weight_files(tmp_path / "straight") == weight_files(tmp_path / "stopped")


def test_longer_sequences_than_the_checkpoint_was_made_for(home: Path, tmp_path: Path) -> None:
    longer: dict[str, Any] = {"seq_length": 96, "max_position_embeddings": 128, "train_iters": 1}
    rope = {"rope_scaling_type": "linear", "rope_scaling_factor": 2.0, "rotary_base": 5e5}
    run(config(home, tmp_path / "rope", **longer, **rope, lora_rank=2), QUIET)
    model = open_model(tmp_path / "rope").config
    assert {name: getattr(model, name) for name in rope} == rope
    assert (model.seq_length, model.max_position_embeddings) == (96, 128)
    with pytest.raises(ConfigError, match=r"max_position_embeddings = 128: .* has"):
        run(config(home, tmp_path / "learned", "gpt2", **longer), QUIET)


def test_other_data_or_template_is_no_continuation(home: Path, tmp_path: Path) -> None:
    run(config(home, tmp_path, train_iters=2), QUIET)
    (tmp_path / "other.jinja").write_text(BUILT_IN["plain"].replace("Assistant:", "Bot:"))
    with pytest.raises(CheckpointError, match="data was"):
        run(config(home, tmp_path, chat_template=str(tmp_path / "other.jinja")), QUIET)


@pytest.mark.parametrize(
    ("base", "changes", "error", "words"),
    [
        ("bare", {}, CheckpointError, "has no tokenizer"),
        ("narrow", {}, DataError, r"hold id \d+ \('.*'\), but the model in .* has 256 ids"),
        ("llama", {"chat_template": None}, ConfigError, "brings no chat template"),
        ("llama", {"chat_template": "chatlm"}, ConfigError, "Did you mean chatml"),
        ("llama", {"train_data": ["no.jsonl"]}, DataError, "--train-data no.jsonl: no such file"),
        ("llama", {"seq_length": 2}, DataError, "no token is left"),
        ("llama", {"train_data": []}, ConfigError, "Give --train-data"),
        ("llama", {"vocab_size": 9}, ConfigError, "vocab_size = 9: .* has 300"),
        ("llama", {"data_path": ["x"]}, ConfigError, "belongs to --task lm"),
    ],
)
def test_refusals_leave_nothing(
    home: Path, tmp_path: Path, base: str, changes: Any, error: Any, words: str
) -> None:
    with pytest.raises(error, match=words):
        run(config(home, tmp_path / "save", base, **changes), QUIET)
    assert not (tmp_path / "save").exists()


def test_bad_lines_are_told_or_skipped(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text((home / "talk.jsonl").read_text() + '{"messages": [{"role": "user"}]}\n')
    with pytest.raises(DataError, match=r"bad.jsonl, line 31 \(byte \d+\).*--on-bad-line skip"):
        run(config(home, tmp_path / "save", train_data=[str(path)]), QUIET)
    told: list[str] = []

    class Listener(Reporter):
        def info(self, message: str) -> None:
            told.append(message)

        warn = info

    changes = {"train_data": [str(path)], "on_bad_line": "skip", "train_iters": 1}
    run(config(home, tmp_path / "save", **changes), Session(Listener(quiet=True)))
    text = "\n".join(told)
    assert "answers end with" not in text
    changes |= {"chat_template": "chatml", "seq_length": 64}
    run(config(home, tmp_path / "other", **changes), Session(Listener(quiet=True)))
    assert any("answers end with" in line and "end of text" in line for line in told)
    assert "1 lines are left out" in text and "line 31" in text and "30 conversations" in text


def test_packing_does_not_depend_on_ranks(home: Path) -> None:
    """Two readings give the same arrays, from the cache and without it."""
    first, reader = corpus(home)
    again = reader.corpus([home / "talk.jsonl"], ["digest"], home / "cache")
    fresh = reader.corpus([home / "talk.jsonl"], ["digest"], home / "other-cache")
    for found in (again, fresh):
        assert np.array_equal(found.ids_T, first.ids_T)
        assert np.array_equal(found.counted_T, first.counted_T)
