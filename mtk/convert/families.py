"""The table of foreign families and the look-ups in it."""

from __future__ import annotations

import difflib

from mtk.config.model import ModelConfig
from mtk.convert.bert import BERT, MEGATRON_BERT
from mtk.convert.bloom import BLOOM
from mtk.convert.family import Family
from mtk.convert.gemma import GEMMA
from mtk.convert.glm_moe import GLM4_MOE
from mtk.convert.gpt2 import GPT2
from mtk.convert.gpt_neox import GPT_NEOX
from mtk.convert.llama import LLAMA
from mtk.convert.mamba2 import MAMBA2
from mtk.convert.mistral import MISTRAL
from mtk.convert.mixtral import MIXTRAL
from mtk.convert.qwen import QWEN2, QWEN3
from mtk.convert.qwen_moe import QWEN2_MOE, QWEN3_MOE
from mtk.convert.t5 import T5
from mtk.errors import ConfigError, ConversionError, Problem

# A native model becomes the first one that can express it.
DECODERS = (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GPT_NEOX, BLOOM, MAMBA2)
WITH_EXPERTS = (MIXTRAL, QWEN2_MOE, QWEN3_MOE, GLM4_MOE)
FAMILIES = (*DECODERS, *WITH_EXPERTS, BERT, MEGATRON_BERT, T5)

# Of families that do not hold a model, those whose reasons are told.
SHOWN = 3
# How the reasons begin that say a family is of another kind altogether.
KINDS = ("family =", "hybrid_layer_pattern =", "num_experts =")


def family_for(config: ModelConfig, wanted: str | None = None) -> Family:
    """The first family that can express a native model, or the ``wanted`` one.

    Raises ConversionError with the reasons of the nearest families when none can, ConfigError for
    a family that is not known.
    """
    known = [family.model_type for family in FAMILIES]
    if wanted is not None and wanted not in known:
        rule = f"is no family that mtk writes: {', '.join(known)}"
        near = difflib.get_close_matches(wanted, known, n=1)
        fix = f"Nearest: {near[0]}." if near else ""
        raise ConfigError([Problem("hf_family", wanted, rule, fix)])
    refused: list[tuple[Family, list[str]]] = []
    for family in FAMILIES:
        if wanted not in (None, family.model_type):
            continue
        reasons = _reasons(family, config)
        if not reasons:
            return family
        refused.append((family, reasons))
    raise ConversionError(_refusal(refused, config))


def _refusal(refused: list[tuple[Family, list[str]]], config: ModelConfig) -> str:
    """Why the nearest families cannot, and the names of the others."""

    def distance(entry: tuple[Family, list[str]]) -> tuple[bool, bool, int]:
        family, reasons = entry
        another = any(reason.startswith(KINDS) for reason in reasons)
        flat = config.hybrid_layer_pattern is not None and not family.patterns
        return another, flat, len(reasons)

    refused = sorted(refused, key=distance)
    lines = ["No Hugging Face family holds this model."]
    for family, reasons in refused[:SHOWN]:
        lines += [f"  not {family.architecture}:", *(f"      - {reason}" for reason in reasons)]
    if len(refused) > SHOWN:
        others = ", ".join(family.model_type for family, _ in refused[SHOWN:])
        lines.append(f"  Further from it: {others}. --hf-family NAME says why.")
    return "\n".join(lines)


def _reasons(family: Family, config: ModelConfig) -> list[str]:
    pattern = config.hybrid_layer_pattern
    if pattern is not None and not family.patterns:
        return [f"hybrid_layer_pattern = {pattern}: every layer there is attention and MLP"]
    return family.reasons(config)


def family_of(model_type: object, where: str) -> Family:
    """The family of a ``config.json``. Raises ConversionError for one not known."""
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    if model_type is None:
        raise ConversionError(
            f"{where} names no model_type: it is not as transformers writes it (mamba_ssm's, for "
            f"one, is not). Convert it with the script that transformers has for its originals; "
            f"this mtk reads {known}."
        )
    raise ConversionError(f"{where}: model_type is {model_type!r}; this mtk reads {known}.")
