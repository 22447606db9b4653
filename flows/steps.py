"""The steps of ``end_to_end``: which stage each runs and how outputs become inputs.

A step's wiring gives the lowest layer of its configuration; the step's section of the
YAML file wins over it. Wirings look at the configurations of earlier steps, so moving
an output in the file moves the input that follows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flows.chain import Chain, Step, Wiring
from mtk.config.flow import SOURCES, FlowConfig, ServeCheckConfig
from mtk.errors import Problem
from stages.registry import Stage


def _trained(wiring: Wiring) -> str:
    """The folder of checkpoints that training ended with."""
    last = wiring.configs.get("finetune", wiring.configs["pretrain"])
    return str(last.checkpoint.save)


def _corpus_files(wiring: Wiring) -> list[str]:
    """The files everything starts from."""
    if wiring.flow.input:
        return list(wiring.flow.input)
    return [wiring.configs["corpus"].output]


def _heldout(wiring: Wiring) -> list[str]:
    """Text that no step trains on."""
    if wiring.flow.input:
        return list(wiring.flow.heldout)
    return [f"{wiring.configs['corpus'].prefix}.heldout.txt"]


def _cloze_files(wiring: Wiring) -> list[str]:
    """Last-word passages from the text held out."""
    if wiring.flow.input:
        return list(wiring.flow.cloze)
    return [f"{wiring.configs['corpus'].prefix}.cloze.jsonl"]


def _corpus(wiring: Wiring) -> dict[str, Any]:
    return {"output": wiring.below("corpus.jsonl"), "heldout": True, "cloze": True}


def _tokenizer(wiring: Wiring) -> dict[str, Any]:
    return {"input": _corpus_files(wiring), "output": wiring.below("tokenizer")}


def _preprocess(wiring: Wiring) -> dict[str, Any]:
    return {
        "input": _corpus_files(wiring),
        "output_prefix": wiring.below("data/corpus"),
        "tokenizer_model": wiring.configs["tokenizer"].output,
        "append_eod": True,
    }


def _pretrain(wiring: Wiring) -> dict[str, Any]:
    preprocess = wiring.configs["preprocess"]
    prefix = f"{preprocess.output_prefix}_{preprocess.json_keys[0]}_{preprocess.level}"
    return {"data_path": [prefix], "save": wiring.below("checkpoints")}


def _finetune(wiring: Wiring) -> dict[str, Any]:
    pretrained = wiring.configs["pretrain"].checkpoint.save
    return {"pretrained_checkpoint": pretrained, "save": wiring.below("finetuned")}


def _evaluate(wiring: Wiring) -> dict[str, Any]:
    return {
        "load": _trained(wiring),
        "task": "WIKITEXT103",
        "detokenizer": "none",  # plain text, not the tokens of WikiText
        "valid_data": _heldout(wiring),
        "output": wiring.below("evaluation"),
    }


def _cloze(wiring: Wiring) -> dict[str, Any]:
    return {
        "load": _trained(wiring),
        "task": "LAMBADA",
        "valid_data": _cloze_files(wiring),
        "output": wiring.below("cloze"),
    }


def _convert(wiring: Wiring) -> dict[str, Any]:
    return {"load": _trained(wiring), "save": wiring.below("hf_model"), "to": "hf"}


def _quantize(wiring: Wiring) -> dict[str, Any]:
    return {
        "load": _trained(wiring),
        "save": wiring.below("quantized_model"),
        "format": "int8_wo",
        "valid_data": _heldout(wiring),
    }


def _serve(wiring: Wiring) -> dict[str, Any]:
    if wiring.check.source == "checkpoint":
        return {"load": _trained(wiring)}
    return {"load": wiring.configs[SOURCES[wiring.check.source]].save}


STEPS = (
    Step("corpus", ("corpus", "demo"), _corpus),
    Step("tokenizer", ("tokenizer", "train"), _tokenizer),
    Step("preprocess", (None, "preprocess"), _preprocess),
    Step("pretrain", (None, "pretrain"), _pretrain),
    Step("finetune", (None, "finetune"), _finetune, on_request=True),
    Step("evaluate", (None, "evaluate"), _evaluate),
    Step("cloze", (None, "evaluate"), _cloze),
    Step("convert", (None, "convert"), _convert),
    Step("quantize", (None, "quantize"), _quantize),
    Step("serve", (None, "serve"), _serve),
)


def left_out(name: str, flow: FlowConfig) -> bool:
    """Whether a step is not run: the user said so, or has brought what it makes."""
    if name in flow.leave_out:
        return True
    return bool(flow.input) and (name == "corpus" or (name == "cloze" and not flow.cloze))


def consistency(sections: Mapping[str, Any]) -> list[Problem]:
    """What is served must be made."""
    flow, check = sections["flow"], sections["check"]
    maker = SOURCES[check.source]
    if "serve" in flow.leave_out or maker not in flow.leave_out:
        return []
    rule = f"is made by step {maker}, which flow.leave_out names"
    fix = f"Run {maker}, serve another source, or leave out serve too."
    return [Problem("check.source", check.source, rule, fix)]


END_TO_END = Chain(STEPS, {"flow": FlowConfig, "check": ServeCheckConfig}, left_out, consistency)


def registered_stages() -> dict[str, Stage]:
    """Every step's stage by step name."""
    return END_TO_END.stages()
