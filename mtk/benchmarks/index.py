"""``mtk bench index``: time and memory of the three indices of a GPT dataset."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mtk.benchmarks.record import surroundings, write_json
from mtk.config.bench_index import IndexBenchConfig
from mtk.data import shuffle
from mtk.data.gpt_indices import IndexPlan, build_indices, plan_indices
from mtk.data.index_cache import IndexCache
from mtk.log import Reporter

COLUMNS = (
    *("samples", "documents", "order", "shuffle", "build", "cpu", "M samples/s"),
    *("arrays GB", "beyond GB", "store", "open"),
)


@dataclass(frozen=True)
class IndexRow:
    """One measurement. seconds: of building, without compiling;
    cpu_seconds: of all its threads, which other programs change less; beyond: bytes of the
    process at its peak that the arrays do not account for, Python and libraries among them;
    base: bytes before the build, of Python, libraries and document lengths."""

    samples: int
    documents: int
    epochs: int
    order: str
    compiled: bool
    compile_seconds: float
    seconds: float
    cpu_seconds: float
    arrays: int
    base: int
    beyond: int
    store_seconds: float | None
    open_seconds: float | None


def bench_index(config: IndexBenchConfig, reporter: Reporter) -> IndexRow:
    """Build the indices in a process of their own, so that the peak is theirs."""
    reporter.info(f"building the indices of {config.samples:,} samples in a process of its own")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        row = pool.submit(measured, config).result()
    content = {"surroundings": surroundings(), "index": asdict(row)}
    write_json(config.output, content)
    return row


def measured(config: IndexBenchConfig) -> IndexRow:
    """The measurement itself."""
    compiled = config.compiled and shuffle.numba_exists()
    least = 0 if compiled else sys.maxsize
    started = time.perf_counter()
    shuffle.shuffle_in_place(np.arange(10, dtype=np.uint32), np.random.RandomState(0), least)
    shuffle.shuffle_in_place(np.arange(10, dtype=np.int32), np.random.RandomState(0), least)
    compile_seconds = time.perf_counter() - started
    sizes, plan = _corpus(config)
    base = peak()
    started, worked = time.perf_counter(), time.process_time()
    documents = np.arange(len(sizes), dtype=np.int32)
    built = vars(build_indices(sizes, documents, 1234, plan, least))
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - worked
    arrays = sum(array.nbytes for array in built.values())
    beyond = peak() - arrays
    store_seconds = open_seconds = None
    if config.cache_folder is not None:
        cache = IndexCache(Path(config.cache_folder))
        description = {"bench": asdict(config)}
        started = time.perf_counter()
        cache.load_or_build("bench", description, lambda: built)
        store_seconds = time.perf_counter() - started
        started = time.perf_counter()
        cache.load_or_build("bench", description, lambda: built)
        open_seconds = time.perf_counter() - started
    return IndexRow(
        plan.samples, len(sizes), plan.epochs, plan.order, compiled, compile_seconds, seconds,
        cpu_seconds,
        arrays, base, beyond, store_seconds, open_seconds,
    )  # fmt: skip


def _corpus(
    config: IndexBenchConfig,
) -> tuple[np.ndarray[tuple[int], np.dtype[np.int32]], IndexPlan]:
    """Lengths of documents, uniform from 1 on, and what the samples of them need."""
    tokens = config.samples * config.seq_length // config.epochs + 1
    longest = max(2, 2 * tokens // config.documents)
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, longest, size=config.documents, dtype=np.int32)
    total = int(sizes.sum(dtype=np.int64))
    plan = plan_indices(total, config.seq_length, config.samples, order=config.data_order)
    return sizes, plan


def peak() -> int:
    """Bytes that this process held at most so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def cells(row: IndexRow) -> Sequence[str]:
    seconds = [None if s is None else f"{s:.1f} s" for s in (row.store_seconds, row.open_seconds)]
    return (
        f"{row.samples:,}", f"{row.documents:,} x {row.epochs}", row.order,
        "numba" if row.compiled else "numpy", f"{row.seconds:.1f} s",
        f"{row.cpu_seconds:.1f} s",
        f"{row.samples / row.seconds / 1e6:.1f}", f"{row.arrays / 1e9:.2f}",
        f"{row.beyond / 1e9:.2f}", *(s or "-" for s in seconds),
    )  # fmt: skip
