"""The table of foreign families and the look-ups in it."""

from __future__ import annotations

from mtk.config.model import ModelConfig
from mtk.convert.family import Family
from mtk.convert.gpt2 import GPT2
from mtk.convert.llama import LLAMA
from mtk.convert.mamba2 import MAMBA2
from mtk.errors import ConversionError

FAMILIES = (GPT2, LLAMA, MAMBA2)


def family_for(config: ModelConfig) -> Family:
    """The family that can express a native model.

    Raises ConversionError with every reason of every family when none can.
    """
    refused = []
    for family in FAMILIES:
        reasons = _reasons(family, config)
        if not reasons:
            return family
        listed = "\n".join(f"      - {reason}" for reason in reasons)
        refused.append(f"  not {family.architecture}:\n{listed}")
    raise ConversionError("No Hugging Face family holds this model:\n" + "\n".join(refused))


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
    raise ConversionError(f"{where}: model_type is {model_type!r}; this mtk reads {known}.")
