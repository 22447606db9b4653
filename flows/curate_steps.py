"""The steps of ``curate_web``: which stage each runs and how outputs become inputs."""

from __future__ import annotations

from typing import Any

from flows.chain import Chain, Step, Wiring
from mtk.config.curate_flow import CurateFlowConfig


def _files(wiring: Wiring) -> list[str]:
    """What the step before has written, or the crawl itself."""
    outputs = [config.output for name, config in wiring.configs.items() if name != "tokenizer"]
    return outputs[-1:] or list(wiring.flow.input)


def _cleaning(name: str) -> Step:
    def wire(wiring: Wiring) -> dict[str, Any]:
        return {"input": _files(wiring), "output": wiring.below(f"{name}.jsonl")}

    # Without evaluation sets, which its section names, there is nothing to look for.
    return Step(name, ("curate", name), wire, on_request=name == "decontaminate")


def _tokenizer(wiring: Wiring) -> dict[str, Any]:
    return {"input": _files(wiring), "output": wiring.below("tokenizer")}


def _preprocess(wiring: Wiring) -> dict[str, Any]:
    wired = {
        "input": _files(wiring),
        "output_prefix": wiring.below("data/corpus"),
        "append_eod": True,
    }
    if "tokenizer" in wiring.configs:
        wired["tokenizer_model"] = wiring.configs["tokenizer"].output
    return wired


STEPS = (
    _cleaning("urls"),
    _cleaning("clean"),
    _cleaning("duplicates"),
    _cleaning("decontaminate"),
    Step("tokenizer", ("tokenizer", "train"), _tokenizer, on_request=True),
    Step("preprocess", (None, "preprocess"), _preprocess),
)
CURATE_WEB = Chain(
    STEPS,
    {"flow": CurateFlowConfig},
    left_out=lambda name, flow: name in flow.leave_out,
    consistency=lambda sections: [],
)
