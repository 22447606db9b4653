"""The language of a text, by a model that comes with its package (py3langid): no network, no
chance, the same answer everywhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from mtk.errors import ConfigError

LOOKED_AT = 600  # characters each of the beginning, the middle and the end
UNKNOWN = "und"  # a text without letters


def language_finder() -> Callable[[str], str]:
    """Text -> ISO 639 code. The first call in a process loads the model for most of a second."""
    identifier = _model()

    def find(text: str) -> str:
        if not any(map(str.isalpha, text)):
            return UNKNOWN
        found: str = identifier.classify(_excerpt(text))[0]
        return found

    return find


def known_languages() -> frozenset[str]:
    """The codes that :func:`language_finder` can give."""
    return frozenset(_model().labels)


def _excerpt(text: str) -> str:
    if len(text) <= 3 * LOOKED_AT:
        return text
    middle = (len(text) - LOOKED_AT) // 2
    return " ".join(
        (text[:LOOKED_AT], text[middle : middle + LOOKED_AT], text[len(text) - LOOKED_AT :])
    )


@lru_cache(maxsize=1)
def _model() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        message = "the language filter needs the package py3langid: pip install 'mtk[curate]'."
        raise ConfigError(message) from error
    return LanguageIdentifier.from_model_file(MODEL_FILE)
