"""Options of ``mtk pretrain``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Self

from mtk.config.attention_rules import AttentionBackend, attention_problems
from mtk.config.data_files import DataFileOptions, read_data_args, read_per_split_data_args
from mtk.config.float8 import float8_training_problems
from mtk.config.masking import MaskingOptions, masking_problems
from mtk.config.model import ModelConfig
from mtk.config.nearest import nearest_multiple
from mtk.config.optimization import OptimizerConfig, PrecisionConfig, ScheduleConfig
from mtk.config.parallel import ParallelConfig
from mtk.config.schema import group, option
from mtk.config.world_rules import launch_problems, launched, smallest_batch, world_size
from mtk.errors import Problem

DEFAULT_SPLIT = "969,30,1"


@dataclass(frozen=True, kw_only=True)
class DataConfig(MaskingOptions, DataFileOptions):
    """Where samples come from."""

    data_path: tuple[str, ...] = option(
        (), help="Dataset prefixes, or weight prefix pairs; split by --split."
    )
    train_data_path: tuple[str, ...] = option((), help="As --data-path, for training only.")
    valid_data_path: tuple[str, ...] = option((), help="As --data-path, for validation only.")
    test_data_path: tuple[str, ...] = option((), help="As --data-path, for the test only.")
    split: str = option(
        DEFAULT_SPLIT,
        help="Shares of training, validation and test sequences (BERT, T5: documents).",
    )
    data_order: Literal["epochs", "megatron"] = option(
        "epochs",
        help="Shuffle each epoch on its own, so that the order does not depend on the training "
        "length; or lay out all epochs at once as Megatron-core does. One epoch is the same.",
    )
    data_cache_path: str | None = option(
        None, help="Folder of index caches (default: beside the data).", runtime=True
    )
    mock_data: bool = option(False, help="Train on generated tokens; needs --vocab-size.")
    eod_mask_loss: bool = option(False, help="No loss on the prediction that follows an EOD.")
    reset_attention_mask: bool = option(
        False, help="Tokens look back inside their own document only (up to the last EOD)."
    )
    reset_position_ids: bool = option(False, help="Positions begin again at 0 after each EOD.")

    def problems(self) -> Iterator[Problem]:
        per_split = (self.train_data_path, self.valid_data_path, self.test_data_path)
        files = (self.data_args_path is not None, self.per_split_data_args_path is not None)
        given = [bool(self.data_path), any(per_split), self.mock_data, *files]
        if sum(given) > 1:
            rule = (
                "excludes --train/valid/test-data-path, --mock-data, --data-args-path and "
                "--per-split-data-args-path; give one of them"
            )
            yield Problem("data_path", self.data_path, rule)
        if not any(given):
            rule = "no data given"
            fix = "Give --data-path PREFIX (what mtk preprocess wrote)."
            yield Problem("data_path", self.data_path, rule, fix)
        divided = self.data_path or self.data_args_path is not None
        if not divided and any(given) and self.split != DEFAULT_SPLIT:
            rule = "only divides the datasets of --data-path"
            yield Problem("split", self.split, rule, "Leave it out.")

    def derived(self) -> Self:
        """Blends in files as if they had been given as options. Raises ConfigError."""
        if self.data_args_path is not None:
            items = read_data_args(self.data_args_path)
            return dataclasses.replace(self, data_path=items, data_args_path=None)
        if self.per_split_data_args_path is not None:
            found = read_per_split_data_args(self.per_split_data_args_path)
            return dataclasses.replace(
                self,
                per_split_data_args_path=None,
                train_data_path=found["train"],
                valid_data_path=found["valid"],
                test_data_path=found["test"],
            )
        return self


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How many samples a step takes."""

    micro_batch_size: int = option(1, help="Samples per forward pass and data-parallel rank.")
    global_batch_size: int | None = option(
        None,
        help="Samples per optimizer step (default: micro-batch x data-parallel ranks).",
    )
    rampup_batch_size: tuple[int, int, int] | None = option(
        None, help="START INCREMENT SAMPLES: grow the batch to its full size over SAMPLES."
    )

    @property
    def full(self) -> int:
        """Samples per step once any ramp-up is over."""
        return self.global_batch_size or self.micro_batch_size

    def problems(self) -> Iterator[Problem]:
        if self.micro_batch_size < 1:
            yield Problem("micro_batch_size", self.micro_batch_size, "must be at least 1")
        if self.global_batch_size is not None and self.global_batch_size < 1:
            yield Problem("global_batch_size", self.global_batch_size, "must be at least 1")
        if self.rampup_batch_size is None or self.micro_batch_size < 1 or self.full < 1:
            return
        start, increment, samples = self.rampup_batch_size
        if min(self.rampup_batch_size) < 1 or start > self.full:
            rule = f"needs positive numbers and START <= global_batch_size = {self.full}"
            yield Problem("rampup_batch_size", self.rampup_batch_size, rule)
        elif (self.full - start) % increment:
            rule = f"INCREMENT must divide global_batch_size - START = {self.full - start}"
            yield Problem("rampup_batch_size", self.rampup_batch_size, rule)
        elif start % self.micro_batch_size or increment % self.micro_batch_size:
            unit = self.micro_batch_size
            rule = f"START and INCREMENT must be multiples of micro_batch_size = {unit}"
            nearest = (nearest_multiple(start, unit), nearest_multiple(increment, unit), samples)
            yield Problem("rampup_batch_size", self.rampup_batch_size, rule, f"Nearest: {nearest}.")


@dataclass(frozen=True, kw_only=True)
class LengthConfig:
    """How long to train; exactly one of the three."""

    train_iters: int | None = option(None, help="Optimizer steps.")
    train_samples: int | None = option(None, help="Samples.")
    train_tokens: int | None = option(None, help="Tokens (rounded up to whole samples).")

    def problems(self) -> Iterator[Problem]:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            found = tuple(vars(self).values())
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in vars(self))
            yield Problem("train_iters", found, f"give exactly one of {flags}")
        for name, value in given.items():
            if value < 1:
                yield Problem(name, value, "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Where checkpoints go."""

    save: str = option(help="Folder of checkpoints; the same command continues them.", runtime=True)
    save_interval: int = option(500, help="Steps between checkpoints.", runtime=True)
    keep_checkpoints: int = option(
        2, help="How many of the newest checkpoints stay; 0 keeps all.", runtime=True
    )
    max_shard_size: int = option(
        2_000_000_000, help="Bytes after which a new weight file begins.", runtime=True
    )

    def problems(self) -> Iterator[Problem]:
        if self.save_interval < 1:
            yield Problem("save_interval", self.save_interval, "must be at least 1")
        if self.keep_checkpoints == 1 or self.keep_checkpoints < 0:
            rule = "must be 0 (all) or at least 2: the last good one stays while one is written"
            yield Problem("keep_checkpoints", self.keep_checkpoints, rule, "Nearest: 2.")
        if self.max_shard_size < 1:
            yield Problem("max_shard_size", self.max_shard_size, "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class SaveConfig(OutputConfig):
    """Where checkpoints go and come from."""

    load: str | None = option(
        None, help="Start from this checkpoint if --save holds none yet.", runtime=True
    )
    finetune: bool = option(
        False, help="Take only the weights from --load: step 0, fresh optimizer and data."
    )

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.finetune and not self.load:
            yield Problem("finetune", True, "needs --load CHECKPOINT")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is reported, and how often."""

    log_interval: int = option(10, help="Steps between log lines.", runtime=True)
    eval_interval: int = option(100, help="Steps between evaluations.", runtime=True)
    eval_iters: int = option(
        10, help="Global batches per evaluation; always the same samples.", runtime=True
    )
    tensorboard_dir: str | None = option(
        None, help="Folder for TensorBoard (extra: track).", runtime=True
    )
    plots: bool = option(True, help="Write loss and throughput plots as PNG.", runtime=True)
    profile: int = option(
        0,
        help="Steps to profile after the 5th; writes trace and kernel table under --save/profile/.",
        runtime=True,
    )

    def problems(self) -> Iterator[Problem]:
        for name in ("log_interval", "eval_interval"):
            if getattr(self, name) < 1:
                yield Problem(name, getattr(self, name), "must be at least 1")
        for name in ("eval_iters", "profile"):
            if getattr(self, name) < 0:
                yield Problem(name, getattr(self, name), "must not be negative", "Nearest: 0.")


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """On what, and with which kernels."""

    seed: int = option(1234, help="Seed of weights, data order and dropout.")
    device: Literal["auto", "cpu", "cuda"] = option("auto", help="Where to train.")
    num_threads: int | None = option(None, help="CPU threads of torch (default: all cores).")
    compile: bool | None = option(
        None, help="Compile each transformer block (default: on CUDA, where that works)."
    )
    loss_chunk_tokens: int | None = option(
        None,
        help="Tokens whose logits exist at a time; backward makes them again (default: all, or "
        "on CUDA as many as take 16 GiB).",
    )
    attention_backend: AttentionBackend = option(
        "auto",
        help="Attention kernel: auto measures PyTorch's fused ones at the start and takes the "
        "fastest (CPU, --deterministic-mode: sdpa); sdpa is PyTorch's own choice; flash, cudnn, "
        "efficient and math are one of its kernels, flash3 and flash4 newer ones in the place of "
        "its flash; flash-attn and transformer-engine are packages.",
        shortcuts=(("--use-flash-attn", "flash"),),
    )
    mamba_backend: Literal["torch", "mamba-ssm"] = option(
        "torch",
        help="What computes the scan and the convolution of Mamba layers: plain PyTorch, or the "
        "CUDA kernels of the packages mamba-ssm and causal-conv1d.",
    )
    deterministic_mode: bool = option(
        False, help="Only deterministic kernels: two runs give identical checkpoints."
    )

    def problems(self) -> Iterator[Problem]:
        if not 0 <= self.seed < 2**32:
            nearest = min(max(self.seed, 0), 2**32 - 1)
            yield Problem("seed", self.seed, "must lie in 0..2^32 - 1", f"Nearest: {nearest}.")
        if self.num_threads is not None and self.num_threads < 1:
            yield Problem("num_threads", self.num_threads, "must be at least 1", "Nearest: 1.")
        if self.loss_chunk_tokens is not None and self.loss_chunk_tokens < 1:
            found, rule = self.loss_chunk_tokens, "must be at least 1"
            yield Problem("loss_chunk_tokens", found, rule, "Nearest: 1.")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything ``mtk pretrain`` needs."""

    recipe: str | None = option(None, help="Start from a named recipe (mtk recipes lists them).")
    model: ModelConfig = group(ModelConfig, title="Model")
    data: DataConfig = group(DataConfig, title="Data")
    batch: BatchConfig = group(BatchConfig, title="Batch")
    length: LengthConfig = group(LengthConfig, title="Length")
    optimizer: OptimizerConfig = group(OptimizerConfig, title="Optimizer")
    schedule: ScheduleConfig = group(ScheduleConfig, title="Learning rate")
    precision: PrecisionConfig = group(PrecisionConfig, title="Precision")
    parallel: ParallelConfig = group(ParallelConfig, title="Layout and memory")
    checkpoint: SaveConfig = group(SaveConfig, title="Checkpoints")
    logging: LoggingConfig = group(LoggingConfig, title="Logging and evaluation")
    runtime: RuntimeConfig = group(RuntimeConfig, title="Runtime")

    @property
    def world(self) -> int:
        """Ranks of the run: those that are started already, else --nproc."""
        return world_size(self.parallel.nproc)

    @property
    def data_parallel_size(self) -> int:
        """Copies of the model, after the checks."""
        return max(1, self.world // self.parallel.model_parallel_size)

    @property
    def global_batch_size(self) -> int:
        """Samples per step; one micro-batch for each copy of the model where not given."""
        return self.batch.global_batch_size or smallest_batch(self.parallel, self.batch, self.world)

    def problems(self) -> Iterator[Problem]:
        if self.data.mock_data and self.model.vocab_size is None:
            yield Problem("model.vocab_size", None, "must be given with --mock-data")
        model = self.model
        for name, value in (
            ("lora.lora_rank", model.lora.lora_rank),
            ("task_head", model.task_head),
        ):
            if value is not None:
                yield Problem(f"model.{name}", value, "belongs to mtk finetune", "Leave it out.")
        yield from self.training_problems()

    def training_problems(self) -> Iterator[Problem]:
        """Rules of any training, whatever its data and wherever its model comes from."""
        batch = self.batch
        if self.schedule.lr_warmup_init > self.optimizer.lr:
            rule = f"must not exceed optimizer.lr = {self.optimizer.lr}"
            yield Problem("schedule.lr_warmup_init", self.schedule.lr_warmup_init, rule)
        yield from self.schedule.problems_with(self.length.train_iters is not None)
        if self.length.train_iters is not None and batch.rampup_batch_size is not None:
            rule = "ramp-up needs a length in samples or tokens"
            fix = "Give --train-samples or --train-tokens instead."
            yield Problem("length.train_iters", self.length.train_iters, rule, fix)
        if self.data.reset_position_ids and self.model.position_embedding_type == "none":
            rule = "has no effect with position_embedding_type = none"
            yield Problem("data.reset_position_ids", True, rule, "Leave it out.")
        yield from masking_problems(self.data, self.model)
        yield from self.parallel.problems_with(self.model)
        yield from self._layout_problems()
        yield from self._kernel_problems()
        tokens = batch.micro_batch_size * self.model.seq_length
        yield from float8_training_problems(
            self.precision,
            self.model,
            self.parallel.pipeline_schedule,
            tokens // max(1, self.parallel.context_parallel_size),
        )

    def _layout_problems(self) -> Iterator[Problem]:
        """The layout against the ranks there will be."""
        yield from launch_problems(self.parallel.nproc)
        started = launched()
        key = "parallel.nproc" if started is None else started.variable
        yield from self.parallel.problems_with_world(self.model, self.batch, self.world, key)

    def _kernel_problems(self) -> Iterator[Problem]:
        """Kernels that the technique, the precision or the device has not."""
        runtime, schedule = self.runtime, self.parallel.pipeline_schedule
        if runtime.compile and schedule in ("zero-bubble", "zbv"):
            rule = "delays weight gradients, which a compiled block computes with all others"
            fix = "Leave out --compile, or use --pipeline-schedule 1f1b or interleaved."
            yield Problem("parallel.pipeline_schedule", schedule, rule, fix)
        yield from self._mamba_kernel()
        if self.parallel.tp_comm_overlap and self.precision.fp8:
            rule = "hides communication behind products in bf16 or fp32"
            yield Problem("parallel.tp_comm_overlap", True, rule, "Leave it out, or --fp8.")
        if self.model.num_experts and runtime.compile and runtime.deterministic_mode:
            # Seen on an H200 with torch 2.11: two runs differ, uncompiled they do not.
            rule = "compiled layers of experts differ from run to run; deterministic_mode does not"
            fix = "Leave out --compile, or --deterministic-mode."
            yield Problem("runtime.compile", True, rule, fix)
        yield from attention_problems(self, runtime.device)

    def _mamba_kernel(self) -> Iterator[Problem]:
        if self.runtime.mamba_backend != "mamba-ssm":
            return
        name, rule, fix = "runtime.mamba_backend", "", "Use --mamba-backend torch."
        if not self.model.has_mamba:
            rule, fix = "computes Mamba layers, of which the model has none", "Leave it out."
        elif self.runtime.device == "cpu":
            rule = "has kernels for CUDA only"
        elif self.runtime.deterministic_mode:
            rule = "adds up gradients in any order; --deterministic-mode asks for one"
        if rule:
            yield Problem(name, "mamba-ssm", rule, fix)

    def derived(self) -> Self:
        """The batch in numbers, so that whatever reads the configuration sees the same one."""
        batch = dataclasses.replace(self.batch, global_batch_size=self.global_batch_size)
        return dataclasses.replace(self, batch=batch)
