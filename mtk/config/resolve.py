"""Merge layers of settings into one checked, immutable configuration."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from mtk.config.coerce import CoercionError, coerce
from mtk.config.schema import Leaf, hints, leaves
from mtk.errors import ConfigError, Problem

T = TypeVar("T")


@dataclass(frozen=True)
class Layer:
    """Settings from one place. values: nested by group or flat by option name."""

    origin: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Resolved(Generic[T]):
    """The configuration and, for every option, the layer that decided it."""

    config: T
    origins: Mapping[str, str]


def make(config_class: type[T], **values: Any) -> T:
    """The checked configuration from Python values, flat or nested; defaults fill the rest."""
    return resolve(config_class, [Layer("call", values)]).config


def resolve(config_class: type[T], layers: Sequence[Layer]) -> Resolved[T]:
    """Merge ``layers`` (later wins), check every rule, derive what was left open.

    A configuration dataclass may define ``problems(self) -> Iterable[Problem]`` (rules)
    and ``derived(self) -> Self`` (values computed from others). All problems of all
    groups are raised together as one :class:`ConfigError`. A class method
    ``implied(given) -> Mapping`` may name options, required ones too, that given ones decide.
    """
    known = list(leaves(config_class))
    values, origins, problems = _merge(known, layers)
    for key, value in _implied(config_class, (), values).items():
        if key not in values:
            values[key], origins[key] = value, "implied"
    reported = {problem.key for problem in problems}
    required = [
        leaf
        for leaf in known
        if leaf.spec.required and leaf.key not in values and leaf.key not in reported
    ]
    problems += [
        Problem(leaf.key, None, "must be given", f"Give --{leaf.name.replace('_', '-')}.")
        for leaf in required
    ]
    if problems:
        raise ConfigError(problems)
    config = _construct(config_class, (), values)
    problems = _problems(config, "")
    if problems:
        raise ConfigError(problems)
    config = _derive(config)
    return Resolved(config, {leaf.key: origins.get(leaf.key, "default") for leaf in known})


def _merge(
    known: Sequence[Leaf], layers: Sequence[Layer]
) -> tuple[dict[str, Any], dict[str, str], list[Problem]]:
    by_key = {leaf.key: leaf for leaf in known}
    by_name = {leaf.name: leaf for leaf in known}
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    problems: list[Problem] = []
    for layer in layers:
        spellings: dict[str, str] = {}
        for key, value in _flatten(layer.values, {leaf.path[:-1] for leaf in known}):
            leaf = by_key.get(key) or by_name.get(key)
            if leaf is None:
                problems.append(_unknown(key, value, layer.origin, [*by_key, *by_name]))
                continue
            try:
                typed = coerce(value, leaf.annotation)
                if leaf.key in spellings and typed != values[leaf.key]:
                    rule = f"was {values[leaf.key]!r} as {spellings[leaf.key]} before"
                    fix = f"Give it once (from {layer.origin})."
                    problems.append(Problem(key, value, rule, fix))
                values[leaf.key], origins[leaf.key] = typed, layer.origin
                spellings[leaf.key] = key
            except CoercionError as error:
                problems.append(Problem(leaf.key, value, f"{error} (from {layer.origin})"))
    return values, origins, problems


def _flatten(
    values: Mapping[str, Any], groups: set[tuple[str, ...]], prefix: tuple[str, ...] = ()
) -> Iterable[tuple[str, Any]]:
    for raw, value in values.items():
        path = (*prefix, *str(raw).replace("-", "_").split("."))
        if path in groups and dataclasses.is_dataclass(value):
            value = vars(value)
        if isinstance(value, Mapping) and path in groups:
            yield from _flatten(value, groups, path)
        else:
            yield ".".join(path), value


def _unknown(key: str, value: Any, origin: str, names: Sequence[str]) -> Problem:
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    fix = f"Did you mean {near[0]}?" if near else "See --help for all options."
    return Problem(key, value, f"unknown option (from {origin})", fix)


def _implied(
    config_class: Any, prefix: tuple[str, ...], values: Mapping[str, Any]
) -> dict[str, Any]:
    """What each group's ``implied`` says, by dotted key."""
    found: dict[str, Any] = {}
    start = "".join(f"{name}." for name in prefix)
    if hasattr(config_class, "implied"):
        names = {key.removeprefix(start): v for key, v in values.items() if key.startswith(start)}
        found = {start + name: value for name, value in config_class.implied(names).items()}
    annotations = hints(config_class)
    for field in dataclasses.fields(config_class):
        if "group" in field.metadata:
            found |= _implied(annotations[field.name], (*prefix, field.name), values)
    return found


def _construct(config_class: Any, prefix: tuple[str, ...], values: Mapping[str, Any]) -> Any:
    annotations = hints(config_class)
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        path = (*prefix, field.name)
        if "group" in field.metadata:
            arguments[field.name] = _construct(annotations[field.name], path, values)
        elif (key := ".".join(path)) in values:
            arguments[field.name] = values[key]
    return config_class(**arguments)


def _problems(config: Any, prefix: str) -> list[Problem]:
    found: list[Problem] = []
    for field in dataclasses.fields(config):
        if "group" in field.metadata:
            found += _problems(getattr(config, field.name), f"{prefix}{field.name}.")
    if hasattr(config, "problems"):
        found += [
            dataclasses.replace(problem, key=prefix + problem.key) for problem in config.problems()
        ]
    return found


def _derive(config: Any) -> Any:
    changes = {
        field.name: _derive(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if "group" in field.metadata
    }
    config = dataclasses.replace(config, **changes)
    return config.derived() if hasattr(config, "derived") else config
