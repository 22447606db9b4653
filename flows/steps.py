"""The steps of ``end_to_end``: which stage each runs and how outputs become inputs.

A step's wiring gives the lowest layer of its configuration; the step's section of the
YAML file wins over it. Wirings look at the configurations of earlier steps, so moving
an output in the file moves the input that follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtk.config.flow import SOURCES, FlowConfig, ServeCheckConfig
from stages.registry import STAGES, Stage


@dataclass(frozen=True)
class Wiring:
    """What a step can be wired from. configs: of the earlier steps, by step name."""

    flow: FlowConfig
    check: ServeCheckConfig
    configs: Mapping[str, Any]

    def below(self, name: str) -> str:
        return str(Path(self.flow.work) / name)

    @property
    def trained(self) -> str:
        """The folder of checkpoints that training ended with."""
        last = self.configs.get("finetune", self.configs["pretrain"])
        return str(last.checkpoint.save)

    @property
    def corpus(self) -> list[str]:
        """The files everything starts from."""
        if self.flow.input:
            return list(self.flow.input)
        return [self.configs["corpus"].output]

    @property
    def heldout(self) -> list[str]:
        """Text that no step trains on."""
        if self.flow.input:
            return list(self.flow.heldout)
        return [f"{self.configs['corpus'].prefix}.heldout.txt"]

    @property
    def cloze(self) -> list[str]:
        """Last-word passages from the text held out."""
        if self.flow.input:
            return list(self.flow.cloze)
        return [f"{self.configs['corpus'].prefix}.cloze.jsonl"]


@dataclass(frozen=True)
class Step:
    """One link of the chain. stage: (group, name) in the table of stages. on_request: it runs
    only where the file has a section for it."""

    name: str
    stage: tuple[str | None, str]
    wire: Callable[[Wiring], dict[str, Any]]
    on_request: bool = False


def _corpus(wiring: Wiring) -> dict[str, Any]:
    return {"output": wiring.below("corpus.jsonl"), "heldout": True, "cloze": True}


def _tokenizer(wiring: Wiring) -> dict[str, Any]:
    return {"input": wiring.corpus, "output": wiring.below("tokenizer")}


def _preprocess(wiring: Wiring) -> dict[str, Any]:
    return {
        "input": wiring.corpus,
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
        "load": wiring.trained,
        "task": "WIKITEXT103",
        "detokenizer": "none",  # plain text, not the tokens of WikiText
        "valid_data": wiring.heldout,
        "output": wiring.below("evaluation"),
    }


def _cloze(wiring: Wiring) -> dict[str, Any]:
    return {
        "load": wiring.trained,
        "task": "LAMBADA",
        "valid_data": wiring.cloze,
        "output": wiring.below("cloze"),
    }


def _convert(wiring: Wiring) -> dict[str, Any]:
    return {"load": wiring.trained, "save": wiring.below("hf_model"), "to": "hf"}


def _quantize(wiring: Wiring) -> dict[str, Any]:
    return {
        "load": wiring.trained,
        "save": wiring.below("quantized_model"),
        "format": "int8_wo",
        "valid_data": wiring.heldout,
    }


def _serve(wiring: Wiring) -> dict[str, Any]:
    if wiring.check.source == "checkpoint":
        return {"load": wiring.trained}
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


def registered_stages() -> dict[str, Stage]:
    """Every step's stage by step name. Raises KeyError for one that is not in the table."""
    table = {(stage.group, stage.name): stage for stage in STAGES}
    return {step.name: table[step.stage] for step in STEPS}
