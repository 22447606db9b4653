"""Command lines that are wrong in every way we could think of: a documented exit code and one
paragraph that names the culprit, never a traceback, and nothing left behind."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest

from mtk.cli.main import main
from mtk.data.indexed_dataset import IndexedDatasetWriter

GOOD = (
    "pretrain --num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 8 "
    "--vocab-size 50 --split 8,1,1 --micro-batch-size 2 --global-batch-size 4 --lr 1e-2 "
    "--device cpu --num-threads 1 --no-plots"
)
# Given unless the line has an option that begins so.
DEFAULTS = {
    "--data-path": "--data-path walk",
    "--train-": "--train-iters 4",
    "--save": "--save run",
}
FILES = {
    "latin.yaml": b"save: \xff\xfe\n",
    "recipe-list.yaml": b"recipe: [a]\n",
    "recipe-number.yaml": b"recipe: 5\n",
    "deep.yaml": b"[" * 3000,
    "twice.yaml": b"num_layers: 2\nnum_layers: 4\n",
    "two-spellings.yaml": b"num_layers: 2\nmodel: {num_layers: 4}\n",
    "truth.yaml": b"load: yes\n",
    "null.yaml": b"num_layers: null\n",
    "group.yaml": b"model: 3\n",
    "broken.json": b"{",
    "list.yaml": b"- a\n",
    "unhashable.yaml": b"? [a]\n: 3\n",
}
LINES = [
    ("--weight-decay -1", 2, "weight_decay"),
    ("--weight-decay nan", 2, "weight_decay"),
    ("--adam-eps -1", 2, "adam_eps"),
    ("--lr inf", 2, "optimizer.lr"),
    ("--clip-grad nan", 2, "clip_grad"),
    ("--seed -1", 2, "Nearest: 0"),
    ("--seed 99999999999", 2, "Nearest: 4294967295"),
    ("--num-threads 0", 2, "num_threads"),
    ("--init-method-std -1", 2, "init_method_std"),
    ("--norm-epsilon nan", 2, "norm_epsilon"),
    ("--position-embedding-type rope --rotary-base 0", 2, "rotary_base"),
    ("--position-embedding-type rope --rotary-percent 2", 2, "rotary_percent"),
    ("--rotary-base 500000", 2, "position_embedding_type = rope"),
    ("--lr-warmup-init 5 --lr-warmup-iters 2", 2, "lr_warmup_init"),
    ("--lr-warmup-iters -2", 2, "lr_warmup_iters"),
    ("--lr-decay-iters 0", 2, "lr_decay_iters"),
    ("--lr-decay-style WSD --lr-wsd-decay-iters -3", 2, "lr_wsd_decay_iters"),
    ("--lr-wsd-decay-iters 3", 2, "WSD"),
    ("--lr-wsd-decay-style linear", 2, "WSD"),
    ("--global-batch-size 0", 2, "global_batch_size"),
    ("--num-query-groups 0", 2, "num_query_groups"),
    ("--max-shard-size 0", 2, "max_shard_size"),
    ("--bf16 --fp16", 2, "--bf16 and --fp16 contradict"),
    ("--swiglu --activation gelu", 2, "contradict"),
    ("--use-flash-attn", 2, "no dropout on the CPU"),
    ("--attention-backend cudnn", 2, "kernels for CUDA only"),
    ("--attention-backend flash5", 2, "flash5"),
    ("--tensorboard-dir list.yaml/x", 2, "tensorboard_dir"),
    ("--num-distributed-optimizer-instances 2", 2, "nothing is sharded"),
    ("--nproc 3", 2, "micro_batch_size x data-parallel size = 2 x 3 = 6"),
    ("--bf16 --hysteresis 3", 2, "fp16"),
    ("--fp16 --loss-scale 8 --loss-scale-window 5", 2, "loss_scale_window"),
    ("--fp16 --min-loss-scale 8 --initial-loss-scale 2", 2, "min_loss_scale"),
    ("--loss-scale inf", 2, "loss_scale"),
    ("--keep-checkpoints 1", 2, "keep_checkpoints"),
    ("--split a,b", 2, "data.split"),
    ("--train-iters 0", 2, "length.train_iters"),
    ("--train-tokens -5", 2, "length.train_tokens"),
    ("--rampup-batch-size -1 2 3", 2, "rampup_batch_size"),
    ("--rampup-batch-size 2 2", 2, "takes 3 values"),
    ("--data-path 0.3 walk -0.7 walk", 3, "weight -0.7"),
    ("--data-path=0.3 walk", 2, "unexpected extra argument"),
    ("--save list.yaml", 4, "list.yaml"),
    ("--save list.yaml/x", 4, "list.yaml/x"),
    ("--load list.yaml", 4, "list.yaml"),
    ("--finetune", 2, "--load"),
    ("--family t5 --position-embedding-type rope", 2, "position_embedding_type"),
    ("--vocab-size 10", 3, "vocab-size"),
    ("--hidden-size 100000000000", 2, "more elements than torch can count"),
    ("--ffn-hidden-size 10000000000000", 2, "not enough memory"),
    ("--hidden-size 100000000000000000000", 2, "more elements than torch can count"),
    ("--mock-data", 2, "mock-data"),
    ("--eod-mask-loss", 2, "eod_mask_loss"),
    ("--set model.nope=3", 2, "model.nope"),
    ("--set nope", 2, "assignment"),
    ("--set recipe=[x]", 2, "recipe"),
    ("--set 'lr={a: 1}'", 2, "optimizer.lr"),
    ("--set num_layers=3 --set model.num_layers=4", 2, "Give it once"),
    ("--config latin.yaml", 2, "UTF-8"),
    ("--config recipe-list.yaml", 2, "recipe"),
    ("--config recipe-number.yaml", 2, "recipe"),
    ("--config deep.yaml", 2, "does not parse"),
    ("--config twice.yaml", 2, "'num_layers' is given twice"),
    ("--config two-spellings.yaml", 2, "Give it once"),
    ("--config truth.yaml", 2, "put it in quotes"),
    ("--config null.yaml", 2, "num_layers"),
    ("--config group.yaml", 2, "unknown option"),
    ("--config broken.json", 2, "does not parse"),
    ("--config list.yaml", 2, "mapping"),
    ("--config unhashable.yaml", 2, "does not parse"),
    ("--config .", 2, "cannot be read"),
]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a dataset and bad files, which is the current one."""
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        Path(name).write_bytes(content)
    with IndexedDatasetWriter(Path("walk"), np.uint16) as writer:
        for start in range(40):
            writer.add_document((np.arange(30) + start) % 50, [30])
    return tmp_path


@pytest.mark.parametrize(("line", "code", "part"), LINES, ids=[line for line, _, _ in LINES])
def test_no_traceback(
    line: str, code: int, part: str, capsys: pytest.CaptureFixture[str], workplace: Path
) -> None:
    arguments = GOOD.split()
    for name, values in DEFAULTS.items():
        if name not in line:
            arguments += values.split()
    assert main([*arguments, *shlex.split(line)]) == code
    errors = capsys.readouterr().err
    assert part in errors and "Traceback" not in errors
    assert not list(workplace.glob("**/step_*"))


def test_a_key_from_a_yaml_anchor_may_be_overridden(workplace: Path) -> None:
    from mtk.config.files import read_layer

    path = workplace / "anchor.yaml"
    path.write_text("base: &b {lr: 1, seed: 2}\nother: {<<: *b, lr: 3}\n")
    assert read_layer(path).values["other"] == {"lr": 3, "seed": 2}
