"""The table of stages: configuration class, function, help.

The command line makes ``mtk NAME`` from each entry and flows look stages up here. Both
attributes are named as ``module:attribute``, so that reading the table imports nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mtk.config import Layer, Resolved, resolve

if TYPE_CHECKING:
    from mtk.artifacts import Artifact
    from mtk.session import Session


@dataclass(frozen=True)
class Stage:
    """One stage. group: the command group it appears in, e.g. ``tokenizer`` for
    ``mtk tokenizer train``; None for top level."""

    name: str
    config: str
    function: str
    help: str
    group: str | None = None

    @property
    def config_class(self) -> Any:
        return load(self.config)

    def resolve(self, layers: Sequence[Layer]) -> Resolved[Any]:
        """The checked configuration from layers, lowest first; a ``recipe`` named in any
        of them becomes the lowest. Raises ConfigError."""
        named = [layer.values["recipe"] for layer in layers if layer.values.get("recipe")]
        if named:
            from mtk.config.recipes import recipe_layer

            layers = [recipe_layer(named[-1]), *layers]
        return resolve(self.config_class, layers)

    def run(self, config: Any, session: Session) -> Artifact | None:
        """Run the stage; servers and listings return None."""
        outcome: Artifact | None = load(self.function)(config, session)
        return outcome


STAGES = (
    Stage(
        "demo",
        "mtk.config.corpus:DemoCorpusConfig",
        "stages.corpus:run",
        "Write the demo corpus: documentation that comes with Python.",
        group="corpus",
    ),
    Stage(
        "wikipedia",
        "mtk.config.curate_wikipedia:CurateWikipediaConfig",
        "stages.curate_wikipedia:run",
        "Turn a Wikipedia dump into clean articles, as JSON lines.",
        group="curate",
    ),
    Stage(
        "urls",
        "mtk.config.curate_web:CurateUrlsConfig",
        "stages.curate_web:run_urls",
        "Drop URLs of unwanted sites and files, malformed ones and duplicates.",
        group="curate",
    ),
    Stage(
        "clean",
        "mtk.config.curate_web:CurateCleanConfig",
        "stages.curate_web:run_clean",
        "Repair texts; drop those that are short, foreign or a notice.",
        group="curate",
    ),
    Stage(
        "duplicates",
        "mtk.config.curate_web:CurateDuplicatesConfig",
        "stages.curate_web:run_duplicates",
        "Keep one of all texts that are the same or nearly (MinHash).",
        group="curate",
    ),
    Stage(
        "decontaminate",
        "mtk.config.curate_web:CurateDecontaminateConfig",
        "stages.curate_web:run_decontaminate",
        "Cut out of texts what evaluation sets hold.",
        group="curate",
    ),
    Stage(
        "web",
        "mtk.config.curate_web:CurateWebConfig",
        "stages.curate_all:run",
        "All of it: a crawl to a clean corpus, as OpenWebText's.",
        group="curate",
    ),
    Stage(
        "train",
        "mtk.config.tokenizer:TrainTokenizerConfig",
        "stages.tokenizer:run",
        "Train a tokenizer from a corpus.",
        group="tokenizer",
    ),
    Stage(
        "preprocess",
        "mtk.config.preprocess:PreprocessConfig",
        "stages.preprocess:run",
        "Turn a corpus into token datasets (.bin/.idx).",
    ),
    Stage(
        "merge",
        "mtk.config.preprocess:MergeConfig",
        "stages.merge:run",
        "Concatenate the token datasets of a folder.",
    ),
    Stage(
        "pretrain",
        "mtk.config.pretrain:PretrainConfig",
        "stages.pretrain:run",
        "Train a model from scratch or from a checkpoint.",
    ),
    Stage(
        "finetune",
        "mtk.config.finetune:FinetuneConfig",
        "stages.finetune:run",
        "Go on from a trained model: plain text, conversations, or RACE, MNLI, QQP; LoRA.",
    ),
    Stage(
        "serve",
        "mtk.config.serve:ServeConfig",
        "stages.serve:run",
        "Serve a model over HTTP: PUT /api (Megatron) and POST /v1/completions (OpenAI).",
    ),
    Stage(
        "convert",
        "mtk.config.convert:ConvertConfig",
        "stages.convert:run",
        "Convert a model to or from Hugging Face or Megatron, with a parity certificate.",
    ),
    Stage(
        "evaluate",
        "mtk.config.evaluate:EvaluateConfig",
        "stages.evaluate:run",
        "Score a model: perplexity, LAMBADA, RACE, MNLI, QQP, tasks of lm-evaluation-harness.",
    ),
    Stage(
        "quantize",
        "mtk.config.quantize:QuantizeConfig",
        "stages.quantize:run",
        "Store weights in INT8, with a perplexity gate.",
    ),
)


def stage(name: str) -> Stage:
    """The stage called ``name``. Raises KeyError."""
    return {entry.name: entry for entry in STAGES}[name]


def load(name: str) -> Any:
    """What ``module:attribute`` names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
