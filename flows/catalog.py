"""The flows there are; reading it imports nothing."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from mtk.errors import ConfigError, Problem


@dataclass(frozen=True)
class FlowEntry:
    """steps: for people; function, chain: ``module:attribute`` of the Prefect flow and of its
    steps as data."""

    name: str
    steps: str
    function: str
    chain: str


FLOWS: Mapping[str, FlowEntry] = {
    "end_to_end": FlowEntry(
        "end_to_end",
        "corpus > tokenizer > preprocess > pretrain (> finetune) > evaluate > cloze > convert"
        " > quantize > serve",
        "flows.end_to_end:end_to_end",
        "flows.steps:END_TO_END",
    ),
    "curate_web": FlowEntry(
        "curate_web",
        "urls > clean > duplicates (> decontaminate) (> tokenizer) > preprocess",
        "flows.curate_web:curate_web",
        "flows.curate_steps:CURATE_WEB",
    ),
}


def find_flow(name: str) -> FlowEntry:
    """Raises ConfigError with the nearest name."""
    if name not in FLOWS:
        near = difflib.get_close_matches(name, FLOWS, n=1)
        fix = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(FLOWS)}."
        raise ConfigError([Problem("flow", name, "no such flow", fix)])
    return FLOWS[name]
