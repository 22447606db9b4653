"""What lm-evaluation-harness found, as mtk writes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mtk.evaluation.lm_eval_tasks import RESAMPLINGS


@dataclass(frozen=True)
class HarnessResult:
    """figures: task -> metric -> value. items: one for each question. details: versions and
    settings. log_likelihoods: every one of them, to see that all are finite."""

    figures: dict[str, Any]
    items: list[dict[str, Any]]
    details: dict[str, Any]
    log_likelihoods: list[float]


def harness_result(found: Mapping[str, Any], limit: int | None) -> HarnessResult:
    """The harness's results as mtk writes them."""
    from lm_eval import __version__ as version

    figures = {name: _metrics(values) for name, values in found["results"].items()}
    items, values = [], []
    for name, samples in found["samples"].items():
        for sample in samples:
            items.append(_item(name, sample))
            values += _log_likelihoods(sample["filtered_resps"])
    details = {
        "harness": {
            "lm_eval": version,
            "bootstrap_iters": RESAMPLINGS,
            "limit": limit,
            "tasks": {
                name: {
                    "version": found["versions"].get(name),
                    "num_fewshot": found["n-shot"].get(name),
                    "questions": dict(found["n-samples"].get(name, {})),
                    "higher_is_better": found["higher_is_better"].get(name),
                }
                for name in found["results"]
            },
        }
    }
    return HarnessResult(figures, items, details, values)


def _metrics(values: Mapping[str, Any]) -> dict[str, Any]:
    """``acc,none`` -> ``acc``; other filters stay in the name."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        if isinstance(value, (int, float)) and "," in key
    }


def _item(task: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    responses = sample["filtered_resps"]
    values = _log_likelihoods(responses)
    item: dict[str, Any] = {"task": task, "doc_id": sample["doc_id"], "filter": sample["filter"]}
    if values:
        item["log_likelihoods"] = values
        greedy = [bool(r[1]) for r in responses if isinstance(r, (tuple, list))]
        item |= {"greedy": greedy} if greedy else {}
    else:
        item["responses"] = [str(response) for response in responses]
    item["target"] = str(sample["target"])
    item["metrics"] = {name: _plain(sample[name]) for name in sample["metrics"]}
    return item | {name: sample[name] for name in ("doc_hash", "prompt_hash", "target_hash")}


def _log_likelihoods(responses: Sequence[Any]) -> list[float]:
    """Of continuations ((value, greedy) each) or of whole texts; none of generated texts."""
    values = [r[0] if isinstance(r, (tuple, list)) and r else r for r in responses]
    return [float(value) for value in values if isinstance(value, (int, float))]


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(part) for part in value]
    if isinstance(value, (bool, int, str)) or value is None:
        return value
    return float(value) if hasattr(value, "__float__") else str(value)
