"""Strict reading of JSON requests: every violation is a 4xx that names the field."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from flask import Request

from mtk.errors import MtkError, ServingError
from mtk.tokenizers import Tokenizer


def read_json(request: Request) -> dict[str, Any]:
    """The request's JSON object.

    Raises ServingError: 415 for another content type, 413 for a body over the limit (by
    Flask), 400 for what is not UTF-8, not JSON, nested too deeply, or not an object.
    """
    if request.mimetype != "application/json" and not request.mimetype.endswith("+json"):
        raise ServingError(
            f"Content-Type is {request.mimetype or 'absent'!r}; send JSON with "
            f"Content-Type: application/json",
            status=415,
        )
    try:
        data = json.loads(request.get_data().decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ServingError(f"the body is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise ServingError("the JSON is nested too deeply") from None
    except ValueError as error:
        raise ServingError(f"the body is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ServingError(f"the body must be a JSON object, not {_kind(data)}")
    return data


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


class Fields:
    """Typed access to the fields of a request; an explicit null counts as not given."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = data

    def given(self, name: str) -> bool:
        return self._data.get(name) is not None

    def raw(self, name: str) -> Any:
        return self._data.get(name)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._data.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise wrong_type(name, value, "true or false")
        return value

    def integer(self, name: str, default: int, *, low: int, high: int, limit: str = "") -> int:
        """limit: the server's option that ``high`` comes from, for the message."""
        value = self._data.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong_type(name, value, "a whole number")
        if not low <= value <= high:
            source = f" ({limit} = {high})" if limit and value > high else ""
            raise ServingError(
                f"{name} = {_short(value)}: must lie in {low}..{high}{source}", param=name
            )
        return value

    def optional_integer(self, name: str, *, low: int, high: int, limit: str = "") -> int | None:
        if not self.given(name):
            return None
        return self.integer(name, low, low=low, high=high, limit=limit)

    def number(self, name: str, default: float, *, low: float, high: float) -> float:
        """A finite number in [low, high]; whole numbers count."""
        value = self._data.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong_type(name, value, "a number")
        if not low <= value <= high:
            raise ServingError(
                f"{name} = {_short(value)}: must lie in [{low:g}, {high:g}]", param=name
            )
        return float(value)

    def text(self, name: str) -> str | None:
        value = self._data.get(name)
        if value is None:
            return None
        return checked_text(name, value)

    def refuse_unknown(self, known: Sequence[str]) -> None:
        """Raises ServingError for the first field not in ``known``, with the nearest name."""
        for name in self._data:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
                raise ServingError(f"unknown field {_short(name)}; {hint}", param=name[:80])


def checked_text(name: str, value: object) -> str:
    """``value`` as text that is Unicode (no lone surrogates)."""
    if not isinstance(value, str):
        raise wrong_type(name, value, "text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ServingError(
            f"{name} holds a lone surrogate at character {error.start}, so it is not Unicode",
            param=name,
        ) from None
    return value


def encode(text: str, tokenizer: Tokenizer, param: str, *, framed: bool = False) -> list[int]:
    """framed: with what the tokenizer puts around a text for an encoder. Raises ServingError
    (400) for text that the tokenizer cannot take."""
    text = checked_text(param, text)
    try:
        return tokenizer.encode_framed(text) if framed else tokenizer.encode(text)
    except MtkError as error:
        raise ServingError(str(error), param=param) from None


def wrong_type(name: str, value: object, wanted: str) -> ServingError:
    return ServingError(f"{name} must be {wanted}, not {_kind(value)}", param=name)


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    names = {dict: "an object", list: "a list", str: "text", int: "a whole number"}
    return names.get(type(value), "a number")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
