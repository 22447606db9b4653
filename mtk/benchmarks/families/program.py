"""All checks of all families, and what is written of them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtk.benchmarks.families.corpus import Corpus, Stages, make_corpus
from mtk.benchmarks.families.figure import write_curves
from mtk.benchmarks.families.layouts import (
    EXPERT_LAYOUTS,
    LAYOUTS,
    LayoutCell,
    compare_layouts,
    make_pool,
)
from mtk.benchmarks.families.resume import ResumeCell, compare_resume
from mtk.benchmarks.families.training import Curve, overfit, training
from mtk.benchmarks.layouts import reason
from mtk.benchmarks.record import surroundings, write_json
from mtk.config import config_digest, to_dict
from mtk.config.bench_families import FamiliesBenchConfig
from mtk.config.family_samples import FAMILY_SAMPLES, FamilySample
from mtk.config.pretrain import PretrainConfig
from mtk.errors import Interrupted, MtkError
from mtk.launch.pool import RankPool
from mtk.log import Reporter
from mtk.models.count_families import parameters
from mtk.session import Session

COLUMNS = ("family", "parameters", "loss", "bound", "steps", *LAYOUTS, *EXPERT_LAYOUTS, "resume")
JSON_FILE = "families.json"
FIGURE = "curves.png"


@dataclass
class Row:
    """One family; cells come as they are checked. errors: checks that could not be finished."""

    sample: FamilySample
    config: PretrainConfig
    curve: Curve | None = None
    layouts: dict[str, LayoutCell] | None = None
    resume: ResumeCell | None = None
    errors: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        found = [*(self.layouts or {}).values(), self.curve, self.resume]
        return [text for cell in found if cell for text in cell.failures] + self.errors


def bench_families(config: FamiliesBenchConfig, stages: Stages, reporter: Reporter) -> list[Row]:
    """Check all families; the JSON file and the figure are complete after each. Raises
    DataError where the corpus cannot be made."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="mtk-families-") as folder, make_pool() as pool:
        corpus = make_corpus(Path(folder), stages, Session(Reporter(quiet=True)))
        for name in config.families:
            row = _row(FAMILY_SAMPLES[name], corpus, Path(folder, name), config, stages, pool)
            rows.append(row)
            reporter.info(f"{name}: {told(row)}")
            _write(config, corpus, rows)
    return rows


def _row(
    sample: FamilySample,
    corpus: Corpus,
    folder: Path,
    config: FamiliesBenchConfig,
    stages: Stages,
    pool: RankPool,
) -> Row:
    quiet, steps = Session(Reporter(quiet=True)), config.steps or sample.steps
    common = {"seed": config.seed, "train_iters": steps, "save_interval": steps}
    run = training(sample, corpus, folder / "overfit", **common)
    row = Row(sample, run)

    def learn() -> None:
        row.curve = overfit(run, sample.bound, stages, quiet)

    def spread() -> None:
        row.layouts = compare_layouts(run, pool)

    def stop() -> None:
        row.resume = compare_resume(sample, corpus, folder / "resume", stages, quiet, config.seed)

    checks: dict[str, Callable[[], None]] = {"overfit": learn, "layouts": spread, "resume": stop}
    for name in config.checks:
        try:
            checks[name]()
        except Interrupted:
            raise
        except MtkError as error:
            row.errors.append(f"{name}: {reason(error)}")
    return row


# -- output -------------------------------------------------------------------------------


def _write(config: FamiliesBenchConfig, corpus: Corpus, rows: Sequence[Row]) -> None:
    """Rows of families that are not asked for stay as an earlier run on the same text left
    them."""
    folder = Path(config.output)
    records = {row.sample.name: plain(row) for row in rows}
    kept = {k: v for k, v in _earlier(folder, corpus).items() if k not in config.families}
    known = kept | records
    ordered = [known[name] for name in FAMILY_SAMPLES if name in known]
    head = {"benchmark": "families", "corpus": corpus.fields()}
    write_json(str(folder / JSON_FILE), {**head, "families": ordered})
    curves = {r["family"]: Curve.of(r["overfit"]) for r in ordered if r["overfit"]}
    write_curves(folder / FIGURE, curves)
    last = rows[-1].sample.name
    if last in curves:
        write_curves(folder / f"{last}.png", {last: curves[last]})


def _earlier(folder: Path, corpus: Corpus) -> dict[str, dict[str, Any]]:
    """Records of ``families.json`` by name; none where it is of another text."""
    try:
        found = json.loads((folder / JSON_FILE).read_text(encoding="utf-8"))
        if found["corpus"]["sha256"] != corpus.sha256:
            return {}
        return {record["family"]: record for record in found["families"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def plain(row: Row) -> dict[str, Any]:
    """A row for machines, with what it was measured on."""
    layouts = row.layouts or {}
    return {
        "family": row.sample.name,
        "recipe": row.sample.recipe,
        "hf": row.sample.hf,
        **surroundings(),
        "parameters": parameters(row.config.model),
        "config_digest": config_digest(row.config),
        "model": to_dict(row.config.model),
        "overfit": row.curve and row.curve.fields(),
        "layouts": {name: cell.fields() for name, cell in layouts.items()},
        "resume": row.resume and row.resume.fields(),
        "failures": row.failures,
    }


def told(row: Row) -> str:
    """A row in a line, for those who wait."""
    if row.failures:
        return f"FAILED: {'; '.join(row.failures[:3])}"
    found = []
    if row.curve is not None:
        found.append(f"loss {row.curve.last:.3f} in {row.curve.seconds:.0f} s")
    if row.layouts:
        found.append(f"equal in {', '.join(row.layouts)}")
    if row.resume is not None:
        found.append("resumes bit for bit")
    return "; ".join(found)


def cells(row: Row) -> list[str]:
    """The row's texts under ``COLUMNS``; of a layout the worst gradient's error."""
    curve, resume = row.curve, row.resume
    return [
        row.sample.name,
        f"{parameters(row.config.model):,}",
        f"{curve.last:.3f}" if curve else "-",
        f"{row.sample.bound:g}",
        f"{curve.points[-1][0]}" if curve else "-",
        *(_cell((row.layouts or {}).get(name)) for name in (*LAYOUTS, *EXPERT_LAYOUTS)),
        "-" if resume is None else "DIFFERENT" if resume.failures else "same bytes",
    ]


def _cell(cell: LayoutCell | None) -> str:
    if cell is None:
        return "-"
    return "DIFFERENT" if cell.failures else f"{cell.step.worst_gradient[1]:.0e}"
