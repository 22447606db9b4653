"""Rotary embeddings in ``config.json``, in the spelling of transformers 5 and the one before.

New: ``rope_parameters`` with everything; old: ``rope_theta`` and the share of channels at the
top, ``rope_scaling`` for the rest. A reader of either finds what it looks for in what is written
here; where both are found they must agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mtk.config.model import ModelConfig
from mtk.convert.family import ForeignConfig

KINDS = ("default", "linear", "llama3", "yarn")
# Keys that a kind may have besides its name, base and share of channels. Linear scaling does not
# look at the original positions.
KEYS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor", "original_max_position_embeddings"),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        # Readers of the old spelling needed it; it says nothing new.
        "finetuned",
    ),
}
ALWAYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


@dataclass(frozen=True)
class Spelling:
    """Names of the base and the share of rotated channels at the top of ``config.json``, and
    the share where none is stated. partial: the family rotates parts of heads at all."""

    base: str = "rope_theta"
    percent: str = "partial_rotary_factor"
    default_percent: float = 1.0
    partial: bool = False


def write_rope(config: ModelConfig, spelling: Spelling = Spelling()) -> dict[str, Any]:
    """The keys for ``config.json``."""
    scaling = _scaling(config)
    share = {"partial_rotary_factor": config.rotary_percent} if spelling.partial else {}
    written: dict[str, Any] = {spelling.base: config.rotary_base}
    if spelling.partial:
        written[spelling.percent] = config.rotary_percent
    kind = scaling or {"rope_type": "default"}
    written["rope_parameters"] = {**kind, "rope_theta": config.rotary_base, **share}
    if scaling:
        written["rope_scaling"] = {**scaling}
    return written


def _scaling(config: ModelConfig) -> dict[str, Any]:
    kind = config.rope_scaling_type
    if kind is None:
        return {}
    found: dict[str, Any] = {"rope_type": kind, "factor": config.rope_scaling_factor}
    if kind == "linear":
        return found
    found["original_max_position_embeddings"] = config.rope_original_positions
    if kind == "llama3":
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        return found | {"low_freq_factor": low, "high_freq_factor": high}
    found |= {"beta_fast": config.yarn_beta_fast, "beta_slow": config.yarn_beta_slow}
    if config.yarn_attention_factor is not None:
        found["attention_factor"] = config.yarn_attention_factor
    return found if config.yarn_truncate else found | {"truncate": False}


def read_rope(
    found: ForeignConfig, positions: int, spelling: Spelling = Spelling()
) -> dict[str, Any]:
    """Native options; complaints go to ``found``. positions: what the model accepts."""
    known = [
        (key, _read(found, key, positions, spelling))
        for key in ("rope_scaling", "rope_parameters")
        if found.data.get(key) is not None
    ]
    if not known:
        return _read(found, "", positions, spelling)
    if any(options != known[0][1] for _, options in known):
        found.complaints.append("rope_scaling and rope_parameters say different things")
    return known[0][1]


def _read(found: ForeignConfig, key: str, positions: int, spelling: Spelling) -> dict[str, Any]:
    """What the object ``key`` says (none: nothing), completed from the top of the file."""
    value = found.data.get(key, {})
    if not isinstance(value, dict):
        found.complaints.append(f"{key} = {value!r} is not an object")
        return {}
    nested = ForeignConfig(value, found.where)
    base = found.get(spelling.base, float, 10000.0)
    share = found.get(spelling.percent, float, spelling.default_percent)
    options: dict[str, Any] = {
        "rotary_base": nested.get("rope_theta", float, base),
        "rotary_percent": nested.get("partial_rotary_factor", float, share),
    }
    if options["rotary_percent"] != 1.0 and not spelling.partial:
        percent = options["rotary_percent"]
        nested.complaints.append(f"rotates {percent:g} of each head; this family rotates all")
    kind = value.get("rope_type", value.get("type", "default"))
    if kind not in KINDS:
        known = ", ".join(KINDS)
        nested.complaints.append(f"rope_type = {kind!r} is not supported; mtk knows {known}")
    else:
        odd = sorted(set(value) - set(ALWAYS) - set(KEYS[kind]))
        if odd:
            nested.complaints.append(f"{kind} rope has no {', '.join(odd)}")
        options |= _scaling_options(str(kind), nested, found, positions)
    found.complaints += [f"{key}: {complaint}" for complaint in nested.complaints]
    return options


def _scaling_options(
    kind: str, nested: ForeignConfig, found: ForeignConfig, positions: int
) -> dict[str, Any]:
    if kind == "default":
        return {}
    # Where stated at the top it counts before the object's own; without either nothing grew.
    own = nested.get("original_max_position_embeddings", int, positions)
    original = found.get("original_max_position_embeddings", int, own)
    if original < 1:
        nested.complaints.append(f"original_max_position_embeddings = {original}: must be above 0")
        return {}
    default = positions / original if kind == "yarn" else None
    options: dict[str, Any] = {
        "rope_scaling_type": kind,
        "rope_scaling_factor": nested.get("factor", float, default),
    }
    if kind != "linear":
        options["rope_original_max_positions"] = original
    if kind == "llama3":
        for name in ("low", "high"):
            options[f"rope_{name}_freq_factor"] = nested.get(f"{name}_freq_factor", float)
    if kind == "yarn":
        options |= {
            "yarn_beta_fast": nested.get("beta_fast", float, 32.0) or 32.0,
            "yarn_beta_slow": nested.get("beta_slow", float, 1.0) or 1.0,
            "yarn_truncate": nested.get("truncate", bool, True),
            "yarn_attention_factor": _attention_factor(nested, options["rope_scaling_factor"]),
        }
    return options


def _attention_factor(nested: ForeignConfig, factor: float) -> float | None:
    """Stated, or as the ratio that DeepSeek's files state, or None: by yarn's own formula."""
    if nested.data.get("attention_factor") is not None:
        return nested.get("attention_factor", float)
    above, below = (nested.get(name, float, 0.0) for name in ("mscale", "mscale_all_dim"))
    if not (above and below) or factor <= 1:
        return None
    return (0.1 * above * math.log(factor) + 1.0) / (0.1 * below * math.log(factor) + 1.0)
