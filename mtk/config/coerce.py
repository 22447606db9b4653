"""Turn text or YAML values into the annotated type, or say why that is not possible."""

from __future__ import annotations

import types
import typing
from typing import Any, Literal, Union


class CoercionError(ValueError):
    """The value does not fit; the message is the violated rule."""


def coerce(value: Any, annotation: Any) -> Any:
    """Return ``value`` as ``annotation`` (int, float, bool, str, Literal, tuple, Optional).

    Text is parsed ("1e-4", "true"), numbers are never silently rounded, and a bool is
    not accepted where an int is asked for.
    """
    origin = typing.get_origin(annotation)
    if origin in (Union, types.UnionType):
        return _optional(value, annotation)
    if origin is Literal:
        return _choice(value, typing.get_args(annotation))
    if origin is tuple:
        return _tuple(value, typing.get_args(annotation))
    if annotation in _SCALARS:
        return _SCALARS[annotation](value)
    raise TypeError(f"options of type {annotation!r} are not supported")


def type_name(annotation: Any) -> str:
    """How ``--help`` names the type."""
    origin = typing.get_origin(annotation)
    if origin in (Union, types.UnionType):
        return type_name(_inner(annotation))
    if origin is Literal:
        return "[" + "|".join(str(choice) for choice in typing.get_args(annotation)) + "]"
    if origin is tuple:
        return f"{type_name(typing.get_args(annotation)[0])}..."
    return {int: "INTEGER", float: "NUMBER", str: "TEXT", bool: "BOOLEAN"}[annotation]


def is_bool(annotation: Any) -> bool:
    return annotation is bool or (_is_optional(annotation) and _inner(annotation) is bool)


def is_tuple(annotation: Any) -> bool:
    inner = _inner(annotation) if _is_optional(annotation) else annotation
    return typing.get_origin(inner) is tuple


def _is_optional(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (Union, types.UnionType)


def _inner(annotation: Any) -> Any:
    return next(arg for arg in typing.get_args(annotation) if arg is not type(None))


def _optional(value: Any, annotation: Any) -> Any:
    if value is None or (value in ("none", "null") and _inner(annotation) is not str):
        return None
    return coerce(value, _inner(annotation))


def _choice(value: Any, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        if value == choice or str(value) == str(choice):
            return choice
    listed = ", ".join(repr(choice) for choice in choices)
    raise CoercionError(f"must be one of {listed}")


def _tuple(value: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, (list, tuple)):
        value = [value]
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(coerce(item, args[0]) for item in value)
    if len(value) != len(args):
        raise CoercionError(f"takes {len(args)} values, not {len(value)}")
    return tuple(coerce(item, arg) for item, arg in zip(value, args, strict=True))


def _int(value: Any) -> int:
    if isinstance(value, bool):
        raise CoercionError("must be a whole number")
    if isinstance(value, int):
        return value
    try:
        number = float(value) if isinstance(value, float) else float(str(value).replace("_", ""))
    except ValueError:
        raise CoercionError("must be a whole number") from None
    if not number.is_integer():
        raise CoercionError("must be a whole number")
    # Digits are parsed exactly; only forms such as 1e9 go through a float.
    text = str(value).replace("_", "")
    return int(text) if text.lstrip("+-").isdigit() else int(number)


def _float(value: Any) -> float:
    if isinstance(value, bool):
        raise CoercionError("must be a number")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise CoercionError("must be a number") from None


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).lower()
    if text in ("true", "yes", "on", "1"):
        return True
    if text in ("false", "no", "off", "0"):
        return False
    raise CoercionError("must be true or false")


def _str(value: Any) -> str:
    if isinstance(value, (dict, list, tuple)) or value is None:
        raise CoercionError("must be text")
    if isinstance(value, bool):
        # YAML reads yes, no, on and off as truth values.
        raise CoercionError("must be text; put it in quotes")
    return str(value)


_SCALARS: dict[Any, Any] = {int: _int, float: _float, bool: _bool, str: _str}
