"""``mtk bench optimizer-memory``: bytes a parameter on each data-parallel rank, counted.

Every storage counts once, as long as it is alive. steady is what stays from one step to the
next (weights, gradients, main weights, moments); peak is the most that was alive at once in a
step of one micro-batch; held_peak in a step of several, whose gradients are held until the
last, and shard_peak in one whose gradients are reduced each time
(``--shard-accumulated-gradients``). Peaks include temporaries: those of the few layers under
way. Sequences are so short that activations hardly count.

Theory: Megatron-Core's table of its distributed optimizer over d ranks. fp16 parameters with
fp16 gradients: 20, or 4 + 16/d; bf16 parameters with fp32 gradients: 18, or 6 + 12/d; fp32:
16, or 8 + 8/d. Sharding everything (ZeRO-3): all of it over d.
"""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from mtk.benchmarks.alive import Alive
from mtk.benchmarks.measured_run import prepare
from mtk.benchmarks.record import surroundings, write_json
from mtk.config import make, to_dict
from mtk.config.bench import BenchConfig, OptimizerMemoryConfig
from mtk.launch.local import launch
from mtk.launch.process import Place
from mtk.log import Reporter
from mtk.training.batch import GlobalBatch
from mtk.training.join import training_ranks
from mtk.training.passes import Accumulation

SEQUENCE = 8
MICRO_BATCHES = 2
# AdamW's counters of steps, a scalar a tensor, are no bytes a parameter.
COUNTERS = 1e-3
# Bytes a parameter: what every rank keeps, and what the ranks share out.
THEORY = {"fp32": (8, 8), "bf16": (6, 12), "fp16": (4, 16)}


@dataclass(frozen=True)
class RankBytes:
    """Of one rank. parameters: of the whole model."""

    parameters: int
    steady: int
    peak: int
    held_peak: int
    shard_peak: int


@dataclass(frozen=True)
class Row:
    """Bytes a parameter; steady and the peaks of the fullest rank."""

    precision: str
    sharding: str
    ranks: int
    theory: float
    steady: float
    peak: float
    held_peak: float
    shard_peak: float
    measured: Sequence[RankBytes] = ()

    @property
    def within(self) -> bool:
        """Also while a step of one micro-batch runs."""
        return max(self.steady, self.peak) <= self.theory * (1 + COUNTERS)

    @property
    def verdict(self) -> str:
        if self.within:
            return "within"
        what = "steady" if self.steady > self.theory * (1 + COUNTERS) else "peak"
        return f"{what} over by {getattr(self, what) - self.theory:.2f}"


def theory(precision: str, sharding: str, ranks: int) -> float:
    """Bytes a parameter and rank."""
    kept, shared = THEORY[precision]
    if sharding == "replicate":
        return kept + shared
    return kept / (ranks if sharding == "full" else 1) + shared / ranks


def bench_optimizer_memory(config: OptimizerMemoryConfig, reporter: Reporter) -> list[Row]:
    """All combinations; with one rank nothing is sharded, whatever the mode."""
    rows = []
    for precision, ranks, sharding in _combinations(config):
        training = training_config(config, precision, sharding, ranks)
        found: list[RankBytes] = launch(measure, (training,), ranks)
        row = Row(
            precision,
            sharding,
            ranks,
            theory(precision, sharding, ranks),
            max(rank.steady / rank.parameters for rank in found),
            max(rank.peak / rank.parameters for rank in found),
            max(rank.held_peak / rank.parameters for rank in found),
            max(rank.shard_peak / rank.parameters for rank in found),
            found,
        )
        rows.append(row)
        reporter.info(" ".join(cells(row)))
        write_json(config.output, content(config, rows))
    return rows


def _combinations(config: OptimizerMemoryConfig) -> Iterator[tuple[str, int, str]]:
    for precision in config.precisions:
        for ranks in config.ranks:
            for sharding in config.shardings if ranks > 1 else ("replicate",):
                yield precision, ranks, sharding


def training_config(
    config: OptimizerMemoryConfig, precision: str, sharding: str, ranks: int
) -> BenchConfig:
    """A model of many equal layers and few words: no unit outweighs the rest."""
    return make(
        BenchConfig,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.hidden_size // 64,
        seq_length=SEQUENCE,
        vocab_size=256,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        lr=1e-3,
        precision=precision,
        # A step that overflows is skipped, and without a step there are no moments to count.
        **({"initial_loss_scale": 2.0**10} if precision == "fp16" else {}),
        micro_batch_size=1,
        global_batch_size=MICRO_BATCHES * ranks,
        nproc=ranks,
        data_parallel_sharding=sharding,
        device="cpu",
        num_threads=1,
    )


# -- one rank -----------------------------------------------------------------------------


def measure(place: Place, config: BenchConfig) -> list[RankBytes]:
    """Three steps; the first one makes the moments."""
    with training_ranks(place, config) as ranks:
        with Alive() as alive:
            config, stepper, batches = prepare(config, ranks, steps=3)
            whole = next(batches)
            single = GlobalBatch(whole.micro_batches[:1], whole.samples // MICRO_BATCHES)
            results = [stepper.step(whole, 0)]
            peaks = []
            for batch, reduce_each in ((single, False), (whole, False), (whole, True)):
                assert isinstance(stepper.passes, Accumulation)
                stepper.passes.reduce_each = reduce_each or sharding_of(config) == "full"
                alive.begin()
                results.append(stepper.step(batch, config.batch.full))
                peaks.append(alive.peak)
            gc.collect()
            steady = alive.bytes()
            assert all(result.applied for result in results), "a skipped step has no moments"
        sizes = (math.prod(shape) for shape in stepper.placed.shapes.values())
        own = RankBytes(sum(sizes), steady, peaks[0], peaks[1], peaks[2])
        if not ranks.distributed:
            return [own]
        found: list[Any] = [None] * ranks.world.size
        dist.all_gather_object(found, own)
        return found


def sharding_of(config: BenchConfig) -> str:
    return config.parallel.data_parallel_sharding


# -- output -------------------------------------------------------------------------------

COLUMNS = (
    "precision",
    "sharding",
    "ranks",
    "theory",
    "steady",
    "peak",
    "held peak",
    "shard peak",
    "is",
)


def cells(row: Row) -> list[str]:
    """The row's texts under ``COLUMNS``; bytes a parameter."""
    return [
        row.precision,
        row.sharding,
        str(row.ranks),
        f"{row.theory:.3f}",
        f"{row.steady:.3f}",
        f"{row.peak:.3f}",
        f"{row.held_peak:.3f}",
        f"{row.shard_peak:.3f}",
        row.verdict,
    ]


def content(config: OptimizerMemoryConfig, rows: Sequence[Row]) -> dict[str, Any]:
    """All figures as plain data."""
    return {
        "benchmark": "optimizer-memory",
        **surroundings(),
        "config": to_dict(config),
        "sequence": SEQUENCE,
        "micro_batches": MICRO_BATCHES,
        "rows": [plain(row) for row in rows],
    }


def plain(row: Row) -> dict[str, Any]:
    return dataclasses.asdict(row) | {"within": row.within}
