"""What a run may start from, and what it must never leave behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mtk.training.run
import mtk.training.saving
from mtk.checkpoint import complete_steps, read_tensors
from mtk.config import make
from mtk.config.tokenizer import TokenizerConfig
from mtk.data.indexed_dataset import IndexedDatasetWriter
from mtk.errors import ArtifactError, CheckpointError, ConfigError, GateError, Interrupted
from mtk.log import Reporter
from mtk.session import Session
from mtk.tokenizers import build_tokenizer
from mtk.training.compatibility import check_tokenizer
from mtk.training.loop import Loop
from mtk.training.metrics import MetricsLog, read_metrics
from mtk.training.plots import write_plots
from mtk.training.step import Stepper, StepResult
from stages.pretrain import run
from tests.training.test_pretrain import QUIET, StopAfter, config, dataset, untimed, weights


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("short")
    run(config(folder, train_iters=8), QUIET)
    return folder


def write_walk(prefix: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for length in rng.integers(5, 60, 300):
            tokens = np.cumsum(rng.integers(1, 4, length)) % 50
            writer.add_document(tokens, [len(tokens)])


def test_finished_run_on_data_that_changed_is_not_passed_off_as_done(tmp_path: Path) -> None:
    prefix, save = tmp_path / "walk", tmp_path / "run"
    write_walk(prefix, 0)
    run(config(save, data_path=[str(prefix)], train_iters=4), QUIET)
    write_walk(prefix, 1)
    shutil.rmtree(f"{prefix}.cache")
    with pytest.raises(CheckpointError, match="data"):
        run(config(save, data_path=[str(prefix)], train_iters=4), QUIET)


def test_a_rest_that_is_no_whole_step_any_more_ends_the_run(tmp_path: Path) -> None:
    changes = {"train_iters": None, "train_samples": 8, "lr_warmup_iters": None}
    changes |= {"save_interval": 1, "keep_checkpoints": 0}
    run(config(tmp_path, **changes), QUIET)
    shutil.rmtree(tmp_path / "step_00000002")
    artifact = run(config(tmp_path, **changes, global_batch_size=8), QUIET)
    assert artifact.folder.name == "step_00000001"


def test_load_of_a_run_that_is_already_longer_is_refused(short: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing is left"):
        run(config(tmp_path / "run", load=str(short), train_iters=8), QUIET)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("killed_at", [4, 9])
def test_fp16_that_skipped_every_step_continues(tmp_path: Path, killed_at: int) -> None:
    """The scale begins far too high: the first steps have no optimizer state to save."""
    changes = {"precision": "fp16", "train_iters": 24, "save_interval": 3, "hysteresis": 1}
    run(config(tmp_path / "straight", **changes), QUIET)
    with pytest.raises(KeyboardInterrupt):
        run(config(tmp_path / "run", **changes), Session(StopAfter(killed_at)))
    run(config(tmp_path / "run", **changes), QUIET)
    assert weights(tmp_path / "run") == weights(tmp_path / "straight")
    assert untimed(tmp_path / "run") == untimed(tmp_path / "straight")


def test_weights_that_broke_in_the_last_step_are_never_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of a step is taken before its update, so it says nothing about the weights."""
    plain = Stepper.step

    def broken(self: Stepper, batch: Any, scheduled_samples: int) -> StepResult:
        result = plain(self, batch, scheduled_samples)
        if scheduled_samples == 7 * 4:
            with torch.no_grad():
                next(iter(self.main.weights.values())).fill_(float("nan"))
        return result

    monkeypatch.setattr(Stepper, "step", broken)
    with pytest.raises(GateError, match="step 8"):
        run(config(tmp_path, log_interval=1), QUIET)
    assert complete_steps(tmp_path) == [4]


def test_changed_bytes_of_a_checkpoint_are_found_before_it_is_continued(
    short: Path, tmp_path: Path
) -> None:
    shutil.copytree(short, tmp_path / "run")
    shard = next((tmp_path / "run" / "step_00000008").glob("optimizer-*"))
    content = bytearray(shard.read_bytes())
    content[-2] ^= 64
    shard.write_bytes(content)
    for where in ({"load": None}, {"load": str(tmp_path / "run"), "finetune": True}):
        save = tmp_path / ("new" if where["load"] else "run")
        with pytest.raises(ArtifactError, match="changed after it was published"):
            run(config(save, train_iters=12, **where), QUIET)


def test_damaged_checkpoints_alone_do_not_mean_a_fresh_start(short: Path, tmp_path: Path) -> None:
    shutil.copytree(short, tmp_path / "run")
    for step in complete_steps(short):
        (tmp_path / "run" / f"step_{step:08}" / "training.json").unlink()
    with pytest.raises(CheckpointError, match=r"training\.json is missing"):
        run(config(tmp_path / "run", train_iters=8), QUIET)


@pytest.mark.parametrize("finetune", [False, True])
def test_weights_are_not_read_as_another_kind_of_model(
    short: Path, tmp_path: Path, finetune: bool
) -> None:
    """Every shape fits, but the function would be another."""
    changes: dict[str, Any] = {"load": str(short), "finetune": finetune, "train_iters": 12}
    for option in ({"num_attention_heads": 8}, {"activation": "relu"}, {"norm_epsilon": 1e-3}):
        with pytest.raises(CheckpointError, match=next(iter(option))):
            run(config(tmp_path / "run", **changes, **option), QUIET)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="activation"):
        shutil.copytree(short, tmp_path / "own")
        run(config(tmp_path / "own", train_iters=12, activation="relu"), QUIET)


def test_changed_options_of_a_loaded_run_are_told(short: Path, tmp_path: Path) -> None:
    heard: list[str] = []

    class Listening(Reporter):
        def warn(self, message: str) -> None:
            heard.append(message)

    run(
        config(tmp_path, load=str(short), train_iters=12, lr=2e-2),
        Session(Listening(quiet=True)),
    )
    assert any("optimizer.lr" in message for message in heard)


@pytest.mark.parametrize(
    "damage", [b"null\n", b"\xff\xfe\n", b"5\n", b'{"step": "x"}\n', b'{"event": "train"}\n']
)
def test_damaged_metrics_do_not_stop_a_run(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    good = json.dumps({"event": "train", "step": 1, "loss": 2.0, "tokens_per_second": 3.0})
    path.write_bytes(good.encode() + b"\n" + damage)
    assert [record["step"] for record in read_metrics(path)] == [1]
    write_plots(path, tmp_path / "plots")
    MetricsLog(path, 1, None).close()
    assert path.read_text() == good + "\n"


def test_figures_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl", 0, None)
    log.write("train", 1, {"loss": 1.0, "grad_norm": float("inf"), "tokens_per_second": 1.0})
    log.close()

    def refuse(name: str) -> None:
        raise ValueError(name)

    line = json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=refuse)
    assert line["grad_norm"] is None


def test_fp16_that_can_never_step_again_is_refused(tmp_path: Path) -> None:
    """At the least scale an overflow cannot be passing."""
    changes = {"precision": "fp16", "init_method_std": 1e4, "min_loss_scale": 2.0**30}
    with pytest.raises(GateError, match="min-loss-scale"):
        run(config(tmp_path, **changes, train_iters=30), QUIET)


def test_state_of_consecutive_checkpoints_differs(short: Path) -> None:
    first, last = (short / f"step_{step:08}" for step in complete_steps(short))
    for name in ("model", "optimizer"):
        old, new = read_tensors(first, name), read_tensors(last, name)
        assert all(not torch.equal(old[key], new[key]) for key in old)


def test_a_run_that_comes_between_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs may pass the first look at an empty folder; the lock alone lets both train."""
    plain = mtk.training.run.run_data

    def slow(*arguments: Any) -> Any:
        monkeypatch.setattr(mtk.training.run, "run_data", plain)
        run(config(tmp_path, train_iters=4), QUIET)
        return plain(*arguments)

    monkeypatch.setattr(mtk.training.run, "run_data", slow)
    with pytest.raises(CheckpointError, match="another run"):
        run(config(tmp_path, train_iters=4), QUIET)
    assert complete_steps(tmp_path) == [4]


def test_force_is_refused_before_anything_is_deleted(short: Path, tmp_path: Path) -> None:
    shutil.copytree(short, tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="tensorboard_dir"):
        run(
            config(tmp_path / "run", tensorboard_dir=str(tmp_path / "file" / "x")),
            Session(Reporter(quiet=True), force=True),
        )
    assert weights(tmp_path / "run") == weights(short)


def test_finetuning_on_data_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    folders = {}
    for name, letters in (("a", "ABC"), ("b", "XYZ")):
        vocabulary = tmp_path / f"{name}.txt"
        vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]))
        settings = make(
            TokenizerConfig, tokenizer_type="BertWordPieceCase", vocab_file=str(vocabulary)
        )
        folders[name] = tmp_path / name
        build_tokenizer(settings).save(folders[name])
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(folders["a"], checkpoint / "tokenizer")
    check_tokenizer(checkpoint, folders["a"])
    check_tokenizer(checkpoint, None)
    with pytest.raises(CheckpointError, match="Preprocess"):
        check_tokenizer(checkpoint, folders["b"])


RAMPUP = {
    "train_iters": None,
    "train_samples": 80,
    "rampup_batch_size": [2, 2, 24],
    "global_batch_size": 8,
    "lr_warmup_iters": None,
    "lr_warmup_samples": 10,
}


@pytest.mark.parametrize(
    ("changes", "killed_at"),
    [
        ({"precision": "bf16"}, 9),
        (RAMPUP, 5),
        ({**RAMPUP, "precision": "bf16", "data_order": "megatron"}, 11),
        ({"data_order": "megatron", "micro_batch_size": 16, "global_batch_size": 32}, 27),
        ({"weight_decay_incr_style": "cosine", "start_weight_decay": 0, "end_weight_decay": 1}, 6),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 8, "compile": False}, 26),
        ({"data_path": "blend"}, 9),
    ],
    ids=["bf16", "rampup", "rampup-bf16-megatron", "megatron-epochs", "decay", "wsd", "blend"],
)
def test_every_kind_of_run_continues_bit_for_bit_with_other_intervals(
    tmp_path: Path, changes: dict[str, Any], killed_at: int
) -> None:
    """The second part logs, evaluates and saves at other steps: nothing of that may count."""
    if "data_path" in changes:
        write_walk(tmp_path / "b", 3)
        changes = {"data_path": ["0.3", str(dataset()), "0.7", str(tmp_path / "b")]}
    run(config(tmp_path / "straight", **changes), QUIET)
    with pytest.raises(KeyboardInterrupt):
        run(config(tmp_path / "run", **changes), Session(StopAfter(killed_at)))
    other = {"log_interval": 3, "eval_interval": 7, "save_interval": 5, "eval_iters": 1}
    run(config(tmp_path / "run", **changes, **other), QUIET)
    assert weights(tmp_path / "run") == weights(tmp_path / "straight")


def test_kill_between_publishing_and_pruning(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(mtk.training.saving, "prune_steps", die)
        with pytest.raises(KeyboardInterrupt):
            run(config(tmp_path, train_iters=8), QUIET)
    run(config(tmp_path, train_iters=8), QUIET)
    assert weights(tmp_path) == weights(short)


def test_a_stop_while_the_run_is_prepared_is_an_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Building the index of a large dataset takes minutes."""
    plain = mtk.training.run.run_data

    def signalled(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(*arguments)

    monkeypatch.setattr(mtk.training.run, "run_data", signalled)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(Interrupted):
            run(config(tmp_path / "run"), QUIET)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not (tmp_path / "run").exists()


def test_a_stop_during_the_last_evaluation_or_plots_still_ends_the_run(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Loop._finish

    def signalled(self: Loop) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        plain(self)

    monkeypatch.setattr(Loop, "_finish", signalled)
    monkeypatch.setattr(
        mtk.training.run, "write_plots", lambda *_: os.kill(os.getpid(), signal.SIGTERM)
    )
    artifact = run(config(tmp_path, train_iters=8, plots=True), QUIET)
    assert artifact.metrics["step"] == 8 and weights(tmp_path) == weights(short)


def test_a_finished_run_may_be_moved(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where checkpoints lie, and how that place is written, does not change what is in them."""
    shutil.copytree(short, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    artifact = run(config(Path("./moved"), train_iters=8), QUIET)
    assert artifact.metrics["step"] == 8
