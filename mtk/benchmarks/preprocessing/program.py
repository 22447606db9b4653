"""``mtk bench preprocess``: every way in a process of its own, on one core unless it says more."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from mtk.artifacts import Artifact
from mtk.benchmarks.preprocessing.plain import PLAIN, Found, Work, texts_of
from mtk.benchmarks.record import surroundings, write_json
from mtk.config import make, to_dict
from mtk.config.bench_preprocess import WAYS, PreprocessBenchConfig
from mtk.config.preprocess import PreprocessConfig
from mtk.data.workers import usable_cores
from mtk.errors import DataError, MtkError
from mtk.log import Reporter
from mtk.session import Session
from mtk.tokenizers import build_tokenizer
from mtk.tokenizers.punkt import (
    find_parameters,
    learn_parameters,
    write_parameters,
)

COLUMNS = (
    "way", "MB of input", "seconds", "CPU seconds", "MB/s", "million tokens/s", "times Megatron",
    "by",
)  # fmt: skip
FAST = ("mtk", "mtk-workers", "mtk-split", "engine")
LIBRARIES = ("tokenizers", "fastokens", "sentencepiece", "transformers", "datatrove", "nltk")

Preprocess = Callable[[PreprocessConfig, Session | None], Artifact]


@dataclass(frozen=True)
class Row:
    """megabytes: of the file, 10^6 bytes. found: None where ``failure`` says why. cpu_seconds:
    of all processes with the start of their Python, which does not count in ``found``; None
    where they are not this program's own children. A busy machine stretches seconds, not these.
    """

    way: str
    megabytes: float
    found: Found | None
    cpu_seconds: float | None = None
    failure: str = ""
    times: float | None = None

    @property
    def rate(self) -> float | None:
        """MB/s."""
        return self.megabytes / self.found.seconds if self.found else None


def bench_preprocess(
    config: PreprocessBenchConfig, preprocess: Preprocess, reporter: Reporter
) -> list[Row]:
    """preprocess: the stage, which lies above this package. Raises DataError."""
    with tempfile.TemporaryDirectory(prefix="mtk-bench-") as name:
        folder = Path(name)
        build_tokenizer(config.tokenizer).save(folder / "tokenizer")
        fast = beginning(Path(config.input), config.megabytes, folder / "fast.jsonl")
        slow = beginning(Path(config.input), config.plain_megabytes, folder / "slow.jsonl")
        punkt = folder / "punkt.json"
        if any(way.endswith("-split") for way in config.ways):
            _write_punkt(slow, config.json_key, punkt)
        rows = []
        for way in [way for way in WAYS if way in config.ways]:
            file = fast if way in FAST else slow
            work = Work(
                str(file), config.json_key, str(folder / "tokenizer"), str(folder / "out"),
                str(punkt) if way.endswith("-split") else "",
                (config.workers or usable_cores()) if way == "mtk-workers" else 1,
            )  # fmt: skip
            reporter.info(f"bench preprocess: {WAYS[way]}")
            rows.append(_best(way, work, preprocess, config.repeats))
    base = {row.way: row.rate for row in rows}
    rows = [_compared(row, base) for row in rows]
    write_json(
        config.output,
        {
            **surroundings(),
            "cpu": cpu_name(),
            "libraries": {name: _version(name) for name in LIBRARIES},
            "config": to_dict(config),
            "rows": [plain(row) for row in rows],
        },
    )
    return rows


def beginning(source: Path, megabytes: int, target: Path) -> Path:
    """The first lines of a file. Raises DataError if there is none."""
    limit = megabytes * 1_000_000
    with source.open("rb") as stream, target.open("wb") as out:
        while out.tell() < limit and (line := stream.readline()):
            out.write(line)
        if not out.tell():
            raise DataError(f"{source} is empty: there is nothing to measure.")
    return target


def _write_punkt(file: Path, key: str, path: Path) -> None:
    """English parameters, installed or learnt, for Megatron's way; and as NLTK's own files,
    where the stage finds them, so that no way has to learn first."""
    texts = itertools.islice(texts_of(Work(str(file), key, "", "")), 2000)
    found = find_parameters("english") or learn_parameters(texts, "english")
    write_parameters(found, path)
    folder = path.parent / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    files = {
        "collocations.tab": ["\t".join(pair) for pair in found["collocations"]],
        "sent_starters.txt": found["sent_starters"],
        "abbrev_types.txt": found["abbrev_types"],
        "ortho_context.tab": [f"{word}\t{flags}" for word, flags in found["ortho_context"].items()],
    }
    for name, lines in files.items():
        (folder / name).write_text("\n".join(lines), encoding="utf-8")


def _best(way: str, work: Work, preprocess: Preprocess, repeats: int) -> Row:
    megabytes = Path(work.file).stat().st_size / 1e6
    rows: list[Row] = []
    for _ in range(repeats):
        shutil.rmtree(work.folder, ignore_errors=True)
        Path(work.folder).mkdir()
        before = _children_seconds()
        try:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, context, initializer=_prepare, initargs=(work,)) as pool:
                found = pool.submit(_measure, way, work, preprocess).result()
        except MtkError as error:
            return Row(way, megabytes, None, failure=str(error))
        spent = _children_seconds() - before
        rows.append(Row(way, megabytes, found, spent if work.workers == 1 else None))
    return min(rows, key=lambda row: row.found.seconds if row.found else 0.0)


def _children_seconds() -> float:
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def _prepare(work: Work) -> None:
    """Libraries with threads of their own use one, as a worker of many does; Punkt's model is
    found where NLTK looks."""
    if work.punkt:
        os.environ["NLTK_DATA"] = str(Path(work.punkt).parent / "nltk_data")
    os.environ["RAYON_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _measure(way: str, work: Work, preprocess: Preprocess) -> Found:
    if way in PLAIN:
        found: Found = PLAIN[way](work)
        return found
    config = make(
        PreprocessConfig,
        input=(work.file,),
        output_prefix=f"{work.folder}/corpus",
        json_keys=(work.key,),
        append_eod=True,
        split_sentences=way == "mtk-split",
        workers=work.workers,
        tokenizer_model=work.tokenizer,
        tokenizer_engine="reference" if way == "mtk-reference" else "auto",
    )
    started = time.perf_counter()
    artifact = preprocess(config, Session(Reporter(quiet=True)))
    seconds = time.perf_counter() - started
    tokens = artifact.metrics["keys"][work.key]["tokens"]
    detail = f"{artifact.metrics['tokenizer_engine']}, {work.workers} worker(s)"
    return Found(seconds, tokens, detail)


def _compared(row: Row, base: dict[str, float | None]) -> Row:
    other = base.get("megatron-split" if row.way.endswith("-split") else "megatron")
    if row.rate is None or other is None:
        return row
    return dataclasses.replace(row, times=row.rate / other)


def cells(row: Row) -> Sequence[str]:
    """A row of the table."""
    if row.found is None:
        return (WAYS[row.way], f"{row.megabytes:.0f}", *"-----", row.failure)
    times = "-" if row.times is None else f"{row.times:.1f}"
    rate = row.megabytes / row.found.seconds
    tokens = row.found.tokens / row.found.seconds / 1e6
    return (
        WAYS[row.way], f"{row.megabytes:.0f}", f"{row.found.seconds:.2f}",
        "-" if row.cpu_seconds is None else f"{row.cpu_seconds:.2f}", f"{rate:.2f}",
        f"{tokens:.2f}", times, row.found.detail,
    )  # fmt: skip


def plain(row: Row) -> dict[str, Any]:
    """For JSON."""
    return dataclasses.asdict(row) | {"megabytes_per_second": row.rate}


def cpu_name() -> str | None:
    """As Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
