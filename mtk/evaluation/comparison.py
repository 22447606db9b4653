"""Two evaluations line by line: what differs, where, and by how much.

Takes folders that ``mtk evaluate`` wrote and ``samples_*.jsonl`` files that
lm-evaluation-harness wrote. Lines meet by their document: windows of a document are added up,
so that runs with other windows, and the harness's one line a document, can be compared too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtk.artifacts import open_artifact
from mtk.errors import ArtifactError, DataError

# Metrics of the harness that say whether an answer was right.
RIGHT = ("acc", "exact_match")


@dataclass
class Answer:
    """What a run says of one document. log_likelihoods: of each choice, or of the text. correct:
    None where the task knows no right answer. responses: texts that were generated, or the class
    that was chosen."""

    key: str
    log_likelihoods: list[float] = field(default_factory=list)
    correct: bool | None = None
    responses: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Difference:
    """key: of the document. size: largest difference of a log-likelihood in nats, infinite
    where they cannot be compared."""

    key: str
    size: float
    flipped: bool
    text: str


@dataclass(frozen=True)
class Comparison:
    """only_a, only_b: documents that the other run lacks. differences: largest first."""

    documents: int
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    differences: tuple[Difference, ...]
    accuracy: tuple[float, float] | None

    @property
    def largest(self) -> float:
        return max((d.size for d in self.differences), default=0.0)

    @property
    def flipped(self) -> int:
        return sum(d.flipped for d in self.differences)

    def equal(self, tolerance: float) -> bool:
        """Same documents, same answers, log-likelihoods within ``tolerance`` nats."""
        same = not self.only_a and not self.only_b and not self.flipped
        return same and self.documents > 0 and self.largest <= tolerance

    def lines(self, top: int) -> list[str]:
        """For people."""
        mean = math.fsum(d.size for d in self.differences) / max(1, self.documents)
        out = [
            f"{self.documents} documents in both, {len(self.only_a)} only in the first, "
            f"{len(self.only_b)} only in the second",
            f"log-likelihoods: largest difference {self.largest:.3e}, mean {mean:.3e} nats",
        ]
        if self.accuracy is not None:
            first, second = self.accuracy
            out.append(f"right: {first:.4%} and {second:.4%}; {self.flipped} answers differ")
        for name, missing in (("first", self.only_a), ("second", self.only_b)):
            if missing:
                out.append(f"only in the {name}: {', '.join(missing[:top])}")
        worst = [d for d in self.differences if d.size > 0 or d.flipped][:top]
        return out + [f"  {d.key}: {d.text}" for d in worst]

    def fields(self) -> dict[str, Any]:
        """For machines; a difference without a number is null, since JSON has no infinity."""
        return {
            "documents": self.documents,
            "only_first": list(self.only_a),
            "only_second": list(self.only_b),
            "largest_difference": self.largest if math.isfinite(self.largest) else None,
            "flipped": self.flipped,
            "accuracy": self.accuracy,
        }


def compare(first: Mapping[str, Answer], second: Mapping[str, Answer]) -> Comparison:
    """Compare the answers of two runs by document."""
    both = [key for key in first if key in second]
    found = [_difference(first[key], second[key]) for key in both]
    found.sort(key=lambda d: (-d.size, not d.flipped, d.key))
    judged = [key for key in both if None not in (first[key].correct, second[key].correct)]
    rates = None
    if judged:
        rights = [sum(bool(run[key].correct) for key in judged) for run in (first, second)]
        rates = (rights[0] / len(judged), rights[1] / len(judged))
    return Comparison(
        len(both),
        tuple(key for key in first if key not in second),
        tuple(key for key in second if key not in first),
        tuple(found),
        rates,
    )


def _difference(a: Answer, b: Answer) -> Difference:
    flipped = a.responses != b.responses
    if a.correct is not None and b.correct is not None:
        flipped = flipped or a.correct != b.correct
    if len(a.log_likelihoods) != len(b.log_likelihoods):
        text = f"{len(a.log_likelihoods)} and {len(b.log_likelihoods)} log-likelihoods"
        return Difference(a.key, math.inf, flipped, text)
    pairs = list(zip(a.log_likelihoods, b.log_likelihoods, strict=True))
    # NaN must count as a difference, which max() would pass over.
    sizes = [abs(x - y) if math.isfinite(x - y) else math.inf for x, y in pairs]
    size = max(sizes, default=0.0)
    text = "texts differ" if a.responses != b.responses else f"{size:.3e}"
    if pairs:
        x, y = pairs[sizes.index(size)]
        text = f"{x:.6f} and {y:.6f}"
    return Difference(a.key, size, flipped, text + (", answers differ" if flipped else ""))


# -- reading ------------------------------------------------------------------------------


def read_run(path: str | Path) -> dict[str, Answer]:
    """Answers by document: task and number. Raises ArtifactError or DataError."""
    path = Path(path)
    if path.suffix == ".jsonl" and path.is_file():
        return _collect(_lines(path), path)
    artifact = open_artifact(path, "evaluation")
    items = artifact.path / "items.jsonl"
    if not items.is_file():
        raise ArtifactError(f"{artifact.path} has no items.jsonl.")
    return _collect(_lines(items), items)


def _lines(path: Path) -> list[dict[str, Any]]:
    out = []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}.") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number} is not JSON: {error}.") from error
        if not isinstance(entry, dict):
            raise DataError(f"{path}:{number} is a JSON {type(entry).__name__}, not an object.")
        out.append(entry)
    return out


def _collect(entries: Sequence[Mapping[str, Any]], path: Path) -> dict[str, Answer]:
    """Tasks are told apart only where a run has several, since every run names its own."""
    names = {str(entry.get("task", "")) for entry in entries}
    out: dict[str, Answer] = {}
    for number, entry in enumerate(entries, start=1):
        try:
            key = _key(entry, several=len(names) > 1)
            answer = out.setdefault(key, Answer(key))
            _add(answer, entry)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(
                f"{path}:{number} is no line of an evaluation: {error!r}. Give folders of mtk "
                f"evaluate, or samples_*.jsonl of lm-evaluation-harness."
            ) from error
    return out


def _key(entry: Mapping[str, Any], *, several: bool) -> str:
    named = [entry[name] for name in ("doc_id", "document", "item") if name in entry]
    parts = [str(entry["task"])] if several else []
    filtered = entry.get("filter", "none")
    return "/".join([*parts, str(named[0]), *([filtered] if filtered != "none" else [])])


def _add(answer: Answer, entry: Mapping[str, Any]) -> None:
    if "log_likelihood" in entry:
        before = answer.log_likelihoods[0] if answer.log_likelihoods else 0.0
        answer.log_likelihoods = [before + float(entry["log_likelihood"])]
        answer.correct = entry.get("correct")
    elif "probabilities" in entry:
        answer.log_likelihoods = [-float(entry["loss"])]
        answer.responses = [str(entry["predicted"])]
        answer.correct = bool(entry["correct"])
    elif "log_likelihoods" in entry or "responses" in entry:
        answer.log_likelihoods = [float(value) for value in entry.get("log_likelihoods", ())]
        answer.responses = [str(text) for text in entry.get("responses", ())]
        answer.correct = _right(entry["metrics"])
    else:
        _add_harness(answer, entry)


def _add_harness(answer: Answer, entry: Mapping[str, Any]) -> None:
    """A line of the harness's own, whose numbers are texts. A whole text has one argument, a
    prompt to continue has its settings besides."""
    whole_text = len(entry["arguments"]["gen_args_0"]) == 1
    for response in entry["filtered_resps"]:
        if isinstance(response, list):
            answer.log_likelihoods.append(float(response[0]))
        elif whole_text:
            answer.log_likelihoods.append(float(response))
        else:
            answer.responses.append(str(response))
    answer.correct = _right(entry)


def _right(metrics: Mapping[str, Any]) -> bool | None:
    found: Iterable[Any] = (metrics[name] for name in RIGHT if name in metrics)
    value = next(iter(found), None)
    return None if value is None else bool(value)
