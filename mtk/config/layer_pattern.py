"""Which layers have experts: Megatron's ``--moe-layer-freq``, read without running it.

Megatron evaluates the text as Python; here it is a number, or a sum of lists of 0 and 1 that
may be repeated: ``[0]*3+[1]*58``, ``([1,0]*12)``.
"""

from __future__ import annotations

import re
from functools import lru_cache

LIST = r"\[\s*[01](?:\s*,\s*[01])*\s*,?\s*\]"
TERM = re.compile(
    rf"(?P<list>{LIST})(?:\s*\*\s*(?P<after>\d+))?|(?P<before>\d+)\s*\*\s*(?P<repeated>{LIST})"
)
# What a list may not exceed, so that a typing error does not fill the memory.
MOST_LAYERS = 100_000


@lru_cache(maxsize=64)
def layer_pattern(text: str) -> tuple[bool, ...] | int:
    """The number N of "every Nth", or for each layer whether it has experts.

    Raises ValueError, with the rule that ``text`` breaks.
    """
    bare = _without_parentheses(text)
    if re.fullmatch(r"[+-]?\d+", bare):
        return int(bare)
    found: list[bool] = []
    for part in bare.split("+"):
        term = TERM.fullmatch(_without_parentheses(part))
        if term is None:
            raise ValueError("must be a number, or lists of 0 and 1 such as [0]*3+[1]*58")
        ones = [digit == "1" for digit in re.findall("[01]", term["list"] or term["repeated"])]
        times = int(term["after"] or term["before"] or 1)
        if len(found) + len(ones) * times > MOST_LAYERS:
            raise ValueError(f"must have no more than {MOST_LAYERS} layers")
        found += ones * times
    return tuple(found)


def _without_parentheses(text: str) -> str:
    """Without the pair around it, if that is the only one."""
    around = re.fullmatch(r"\s*\(([^()]*)\)\s*", text)
    return (around[1] if around else text).strip()


def has_experts(text: str, layer: int) -> bool:
    """Whether layer number ``layer`` has experts; Megatron counts them from 0 too."""
    pattern = layer_pattern(text)
    if isinstance(pattern, int):
        return layer % pattern == 0
    return pattern[layer]


def pattern_problem(text: str, layers: int) -> str:
    """The rule that ``text`` breaks in a model of ``layers`` layers; empty if none."""
    try:
        pattern = layer_pattern(text)
    except ValueError as error:
        return str(error)
    if isinstance(pattern, int):
        return "" if 1 <= pattern <= max(layers, 1) else f"must lie in 1..num_layers = {layers}"
    if len(pattern) != layers:
        return f"lists {len(pattern)} layers; num_layers = {layers}"
    return "" if any(pattern) else "gives no layer any experts"


def nearest_pattern(text: str, layers: int) -> str:
    """The legal value closest to ``text``, as a fix."""
    try:
        pattern = layer_pattern(text)
    except ValueError:
        pattern = 1
    if isinstance(pattern, int):
        return f"Nearest: {min(max(pattern, 1), max(layers, 1))}."
    kept = (*pattern[:layers], *(True,) * (layers - len(pattern)))
    return f"Nearest: {as_text(kept if any(kept) else (*kept[:-1], True))}."


def shrunk_pattern(text: str, layers: int) -> str:
    """A pattern of fewer layers with layers of the same kinds."""
    pattern = layer_pattern(text)
    if isinstance(pattern, int):
        return str(min(pattern, 2, layers))
    kept = [pattern[layer * len(pattern) // layers] for layer in range(layers)]
    if layers > 1:
        kept[0] = kept[0] and (all(pattern) or not all(kept))
    kept[-1] = kept[-1] or not any(kept)
    return as_text(tuple(kept))


def shortest_text(pattern: tuple[bool, ...]) -> str:
    """The number N if every Nth layer has experts, else the lists."""
    for step in range(1, len(pattern) + 1):
        if all(one == (layer % step == 0) for layer, one in enumerate(pattern)):
            return str(step)
    return as_text(pattern)


def as_text(pattern: tuple[bool, ...]) -> str:
    """A pattern as lists, equal neighbours together."""
    runs: list[list[int]] = []
    for one in pattern:
        if runs and runs[-1][0] == one:
            runs[-1][1] += 1
        else:
            runs.append([int(one), 1])
    return "+".join(f"[{one}]*{times}" if times > 1 else f"[{one}]" for one, times in runs)
