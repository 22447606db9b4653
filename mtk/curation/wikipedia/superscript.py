"""Raised characters."""

from __future__ import annotations

_SUPERSCRIPT = str.maketrans("0123456789+-−()ni", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁽⁾ⁿⁱ")
_RAISED = frozenset("0123456789+-−()ni")


def superscript(text: str) -> str:
    """Powers as Unicode writes them: 10⁶ is not 106. Letters and others stay on the line."""
    text = text.strip()
    if (text.strip("+-−()ni") and _RAISED.issuperset(text)) or text in ("n", "+", "-", "−"):
        return text.translate(_SUPERSCRIPT)
    return text
