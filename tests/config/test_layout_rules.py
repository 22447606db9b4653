"""Bad layouts: every violation at once, with the nearest legal values, exit code 2, and
nothing started or written."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mtk.cli.main import main
from mtk.config import make
from mtk.config.model import ModelConfig
from mtk.config.nearest import divisors, nearest
from mtk.config.parallel import ParallelConfig
from mtk.config.plan import PlanConfig
from mtk.config.pretrain import BatchConfig, PretrainConfig
from mtk.config.world_rules import launch_problems, smallest_batch, world_size
from mtk.errors import ConfigError

GOOD = (
    "pretrain --num-layers 6 --hidden-size 48 --num-attention-heads 12 --num-query-groups 4 "
    "--ffn-hidden-size 96 --seq-length 48 --vocab-size 50 --mock-data --micro-batch-size 2 "
    "--attention-dropout 0 --lr 1e-2 --save run --device cpu --no-plots"
)

# Options, then one text a violation; " .. " stands between parts of it.
BAD: list[tuple[str, list[str]]] = [
    # tensor
    ("--tp 5 --nproc 5", ["heads = 12. Nearest: 4 or 12", "groups = 4", "ffn", "125 or 130"]),
    ("--tp 3 --nproc 3", ["num_query_groups = 4. Nearest: 2 or 4", "divisible_by = 128"]),
    ("--tp 24 --nproc 24", ["exceed model.num_attention_heads = 12. Nearest: 12", "divisible_by"]),
    ("--tp 4 --nproc 4 --ffn-hidden-size 98", ["tensor_model_parallel_size = 4: must divide"]),
    ("--tp 4 --nproc 4 --make-vocab-size-divisible-by 50", ["(50 now) .. Nearest: 48 or 52"]),
    ("--tp 0", ["tensor_model_parallel_size = 0: must be at least 1. Nearest: 1"]),
    # sequence
    ("--sequence-parallel", ["of which there is one. Raise --tp"]),
    ("--tp 4 --nproc 4 --sequence-parallel --seq-length 50", ["Nearest: 48 or 52"]),
    ("--tp 4 --cp 2 --nproc 8 --sequence-parallel --seq-length 52", ["26 tokens .. 48 or 56"]),
    # context
    ("--cp 5 --nproc 5", ["2 x context_parallel_size = 10. Nearest: 40 or 50"]),
    ("--cp 2 --nproc 2 --seq-length 50", ["= 4. Nearest: 48 or 52"]),
    ("--cp-comm-type a2a", ["of which there is one. Raise --cp"]),
    ("--cp 8 --nproc 8 --cp-comm-type a2a", ["the 12 heads .. Nearest: 6 or 12. Or use --cp-c"]),
    ("--cp 2 --nproc 2 --set model.attention_dropout=0.1", ["p2p. Use --attention-dropout 0, or"]),
    # pipeline
    ("--pp 7 --nproc 7", ["7 stages of 6 layers .. Nearest: 6"]),
    ("--pp 4 --nproc 4 --pipeline-schedule zbv", ["8 stages of 6 layers .. Nearest: 3"]),
    ("--pipeline-schedule 1f1b", ["pipeline_schedule = '1f1b' .. Raise --pp"]),
    ("--pipeline-split 3 3", ["pipeline_split = (3, 3) .. Raise --pp"]),
    ("--num-layers-per-virtual-pipeline-stage 2", ["there is one .. Raise --pp"]),
    ("--pp 2 --nproc 2 --pipeline-split 3 4", ["6 layers, not 7. For example 3 3"]),
    ("--pp 2 --nproc 2 --pipeline-split 6 0", ["one layer in each stage. Nearest: 6 1"]),
    ("--pp 2 --nproc 2 --pipeline-split 2 2 2", ["multiple of PP = 2. Nearest: 2 or 4 numbers"]),
    (
        "--pp 2 --nproc 2 --pipeline-split 3 3 --num-layers-per-virtual-pipeline-stage 3",
        ["already says how many layers"],
    ),
    (
        "--pp 2 --nproc 2 --num-layers-per-virtual-pipeline-stage 2",
        ["must divide the model's 6 layers. Nearest: 1. Or give"],
    ),
    (
        "--pp 2 --nproc 2 --num-layers-per-virtual-pipeline-stage 3",
        ["one stage a rank of 6 layers, which is no virtual stage. Nearest: 1"],
    ),
    ("--pp 4 --nproc 4 --pipeline-schedule interleaved", ["8 stages of 6 layers"]),
    (
        "--pp 2 --nproc 2 --pipeline-schedule interleaved --pipeline-split 3 3",
        ["at least 2 stages a rank; this layout has 1. Nearest: 1f1b"],
    ),
    (
        "--pp 2 --nproc 2 --pipeline-schedule 1f1b --num-layers-per-virtual-pipeline-stage 1",
        ["this layout has 3. Nearest: interleaved"],
    ),
    (
        "--pp 2 --nproc 2 --pipeline-schedule zbv --num-layers-per-virtual-pipeline-stage 1",
        ["exactly 2 stages a rank; this layout has 3"],
    ),
    ("--pp 2 --nproc 2 --pipeline-schedule zbv --compile", ["a compiled block computes"]),
    # experts, data
    ("--ep 2 --nproc 2", ["no experts to share. Nearest: 1"]),
    ("--ep 3 --nproc 2", ["no experts to share", "data x context ranks, 2. Nearest: 2"]),
    ("--num-distributed-optimizer-instances 2 --nproc 4", ["nothing is sharded. Add --use"]),
    (
        "--num-distributed-optimizer-instances 3 --nproc 4 --use-distributed-optimizer",
        ["data x context ranks, 4. Nearest: 2"],
    ),
    (
        "--num-distributed-optimizer-instances 4 --nproc 4 --data-parallel-sharding full",
        ["with nothing to shard. Nearest: 2"],
    ),
    # ranks, batch
    ("--tp 2 --nproc 3", ["TP x PP x CP = 2. Nearest: 2 or 4, or --tp 1"]),
    ("--tp 2 --cp 2 --nproc 6", ["= 4. Nearest: 4 or 8, or --tp 1, or --cp 1"]),
    ("--pp 3", ["parallel.nproc = 1 .. Nearest: 3, or --pp 1"]),
    ("--nproc 0", ["nproc = 0: must be at least 1"]),
    ("--nproc 4 --global-batch-size 12", ["2 x 4 = 8. Nearest: 8 or 16"]),
    (
        "--tp 2 --nproc 3 --global-batch-size 5",
        ["nproc = 3", "micro_batch_size = 2. Nearest: 4 or 6"],
    ),
    (
        "--nproc 4 --global-batch-size 16 --rampup-batch-size 4 6 20 --train-samples 80",
        ["multiples of micro_batch_size x data-parallel size = 2 x 4 = 8. Nearest: (8, 8, 20)"],
    ),
    # recomputation
    ("--recompute-granularity full", ["needs a method"]),
    ("--recompute-method block", ["the granularity is None. Add"]),
    ("--recompute-activations --recompute-method uniform", ["the granularity is selective"]),
    ("--recompute-num-layers 2", ["there is none. Add --recompute-granularity full"]),
    (
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 7",
        ["6 layers of the longest stage. Nearest: 6"],
    ),
    (
        "--pp 4 --nproc 4 --recompute-granularity full --recompute-method block "
        "--recompute-num-layers 3",
        ["2 layers of the longest stage. Nearest: 2"],
    ),
    ("--recompute-granularity full --recompute-num-layers 0", ["at least 1", "a method", "there"]),
    # runtime
    ("--distributed-timeout-minutes 0", ["greater than 0"]),
    ("--replica-check-interval -1", ["Nearest: 0"]),
    # several techniques at once
    (
        "--tp 5 --cp 5 --pp 7 --ep 2 --nproc 6 --cp-comm-type a2a --recompute-method block "
        "--pipeline-schedule interleaved",
        [
            "granularity is None",
            "heads = 12",
            "groups = 4",
            "ffn_hidden_size = 96",
            "divisible_by",
            "seq_length = 48",
            "14 stages of 6",
            "no experts",
            "TP x PP x CP = 175",
        ],
    ),
]


@pytest.fixture
def nothing_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, in which starting a process is a failure."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"a process was started: {args}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(os, "fork", refuse)
    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", refuse)
    for name in ("MTK_WORLD_SIZE", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize(("line", "parts"), BAD, ids=[line for line, _ in BAD])
def test_all_violations_at_once(
    line: str, parts: list[str], capsys: pytest.CaptureFixture[str], nothing_starts: Path
) -> None:
    length = "" if "--train" in line else " --train-iters 4"
    assert main(shlex.split(f"{GOOD}{length} {line}")) == 2
    errors = capsys.readouterr().err
    found = errors.count("\n  - ") or 1
    lines = errors.splitlines()
    missing = [
        part
        for part in parts
        if not any(all(piece in line for piece in part.split(" .. ")) for line in lines)
    ]
    assert not missing and found == len(parts), errors
    assert list(nothing_starts.iterdir()) == []


def test_the_program_itself_refuses_before_it_writes(tmp_path: Path) -> None:
    line = f"-m mtk {GOOD} --train-iters 4 --tp 5 --nproc 5"
    done = subprocess.run(
        [sys.executable, *shlex.split(line)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "4 problems in the configuration" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


# -- what is legal ------------------------------------------------------------------------

MODEL: dict[str, Any] = {
    "num_layers": 6,
    "hidden_size": 48,
    "num_attention_heads": 12,
    "num_query_groups": 4,
    "ffn_hidden_size": 96,
    "seq_length": 48,
    "vocab_size": 50,
    "attention_dropout": 0.0,
}
RUN: dict[str, Any] = {"mock_data": True, "train_iters": 4, "lr": 1e-2, "save": "run"}


@pytest.mark.parametrize(
    "layout",
    [
        {"nproc": 4, "pipeline_model_parallel_size": 4},  # 6 layers over 4 stages
        {"nproc": 2, "pipeline_model_parallel_size": 2, "pipeline_split": (4, 2)},
        {"nproc": 2, "pipeline_model_parallel_size": 2, "pipeline_split": (2, 2, 1, 1)},
        {"nproc": 2, "pipeline_model_parallel_size": 2, "pipeline_schedule": "zbv"},
        {"nproc": 4, "tensor_model_parallel_size": 4, "sequence_parallel": True},
        {"nproc": 12, "tensor_model_parallel_size": 12, "make_vocab_size_divisible_by": 12},
        {"nproc": 4, "context_parallel_size": 2, "cp_comm_type": "a2a"},
        {
            "nproc": 4,
            "data_parallel_sharding": "full",
            "num_distributed_optimizer_instances": 2,
        },
    ],
    ids=str,
)
def test_legal_layouts_pass(layout: dict[str, Any]) -> None:
    config = make(PretrainConfig, **{**MODEL, **RUN, **layout})
    parallel = config.parallel
    assert config.batch.global_batch_size == smallest_batch(parallel, config.batch, config.world)
    assert config.batch.full == parallel.nproc // parallel.model_parallel_size


def test_the_launcher_decides_the_number_of_ranks() -> None:
    assert world_size(3, {}) == 3
    assert world_size(1, {"WORLD_SIZE": "8"}) == 8
    assert not list(launch_problems(1, {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}))
    assert not list(launch_problems(4, {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}))
    assert [p.fix for p in launch_problems(8, {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"})] == [
        "Leave it out, or give 4."
    ]


@pytest.mark.parametrize(
    ("environment", "world"),
    [
        ({"MTK_WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, 2),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "4"}, 4),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, 8),
        ({"SLURM_NTASKS": "8"}, 3),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, 3),  # an interactive shell
        ({"WORLD_SIZE": "many"}, 3),
    ],
    ids=str,
)
def test_every_launcher_is_known(environment: dict[str, str], world: int) -> None:
    assert world_size(3, environment) == world


def test_under_a_launcher_its_ranks_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE = 6: must be a multiple of .* = 4"):
        make(PretrainConfig, **MODEL, **RUN, tensor_model_parallel_size=4)
    with pytest.raises(ConfigError, match="6 ranks are already started"):
        make(PretrainConfig, **MODEL, **RUN, nproc=2)


def test_an_open_vocabulary_needs_padding_for_any(monkeypatch: pytest.MonkeyPatch) -> None:
    parallel, model = ParallelConfig(tensor_model_parallel_size=3), {**MODEL, "vocab_size": None}
    model = {**model, "num_query_groups": None}
    found = list(parallel.problems_with(ModelConfig(**model)))
    assert [problem.key for problem in found] == ["model.make_vocab_size_divisible_by"]
    assert found[0].fix == "Nearest: 126 or 129."


def test_a_plan_asks_the_same_of_its_gpus() -> None:
    with pytest.raises(ConfigError) as error:
        make(PlanConfig, **MODEL, lr=1e-2, gpus=6, tensor_model_parallel_size=4, nproc=1)
    assert str(error.value).startswith("hardware.gpus = 6: must be a multiple of TP x PP x CP = 4")
    assert make(PlanConfig, **MODEL, lr=1e-2, tensor_model_parallel_size=4).gpus == 4


# -- nearest values -----------------------------------------------------------------------


def test_corrections_are_legal() -> None:
    """The tensor-parallel sizes that a refusal names pass."""
    for heads in (1, 6, 12, 16, 40):
        for groups in divisors(heads):
            for tp in range(1, heads + 3):
                model = ModelConfig(
                    num_layers=1,
                    hidden_size=heads * 4,
                    num_attention_heads=heads,
                    num_query_groups=groups,
                    seq_length=8,
                    vocab_size=heads * 7 * 6 * 11,
                    make_vocab_size_divisible_by=1,
                )
                for problem in ParallelConfig(tensor_model_parallel_size=tp).problems_with(model):
                    if problem.key == "model.make_vocab_size_divisible_by":
                        continue
                    named = [int(n) for n in problem.fix.strip(".").split(" ")[1::2]]
                    assert named, problem
                    for better in named:
                        layout = ParallelConfig(tensor_model_parallel_size=better)
                        keys = [p.key for p in layout.problems_with(model)]
                        assert "parallel.tensor_model_parallel_size" not in keys


def test_nearest_names_both_sides() -> None:
    assert nearest(5, [1, 2, 4, 8]) == "Nearest: 4 or 8."
    assert nearest(9, [4, 8]) == "Nearest: 8."
    assert nearest(9, []) == ""


@pytest.mark.parametrize(
    ("layout", "world", "parts"),
    [
        ({"expert_model_parallel_size": 4}, 4, ["model.num_experts = 6. Nearest: 3 or 6"]),
        (
            {"expert_model_parallel_size": 3, "context_parallel_size": 2},
            4,
            ["data x context ranks, 4. Nearest: 2"],
        ),
        (
            {
                "expert_model_parallel_size": 2,
                "data_parallel_sharding": "full",
                "num_distributed_optimizer_instances": 4,
            },
            8,
            [],
        ),
        (
            {
                "expert_model_parallel_size": 6,
                "data_parallel_sharding": "full",
                "num_distributed_optimizer_instances": 4,
            },
            12,
            ["the ranks with the same experts, 2. Nearest: 2"],
        ),
        ({"tensor_model_parallel_size": 4}, 4, ["an expert's MLP, 48, in parts of 8. Nearest: 2"]),
    ],
    ids=str,
)
def test_experts(layout: dict[str, Any], world: int, parts: list[str]) -> None:
    model = ModelConfig(**MODEL, num_experts=6, moe_ffn_hidden_size=48)
    parallel = ParallelConfig(**layout)
    batch = BatchConfig()
    found = [*parallel.problems(), *parallel.problems_with(model)]
    found += parallel.problems_with_world(model, batch, world)
    assert len(found) == len(parts), found
    for problem, part in zip(found, parts, strict=True):
        assert part in str(problem)
