"""One YAML file -> all configurations of a chain of stages, checked before anything runs."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.chain import Chain, FlowSettings, Wiring
from flows.steps import END_TO_END
from mtk.config import Layer, resolve
from mtk.config.files import read_layer
from mtk.errors import ConfigError, Problem
from stages.registry import Stage


@dataclass(frozen=True)
class PlannedStep:
    """A stage with its resolved configuration."""

    name: str
    stage: Stage
    config: Any


@dataclass(frozen=True)
class Pipeline:
    """What a flow is going to do, in order. file: the YAML file it was read from. check: its
    section of that name, if the chain has one."""

    file: str
    flow: FlowSettings
    check: Any
    steps: tuple[PlannedStep, ...]

    @property
    def work(self) -> Path:
        return Path(self.flow.work)


def plan_pipeline(
    path: str | Path,
    stages: Mapping[str, Stage],
    chain: Chain = END_TO_END,
    overrides: Layer | None = None,
) -> Pipeline:
    """Read the file and resolve every step, wiring outputs to inputs.

    stages: the stage of every step by step name. overrides: values by section, above
    the file's. Raises ConfigError with the problems of all sections together.
    """
    sections = _sections(read_layer(path), overrides, chain)
    problems: list[Problem] = []
    groups = {
        name: _resolve_group(config_class, name, sections, problems)
        for name, config_class in chain.sections.items()
    }
    if None in groups.values():
        raise ConfigError(problems)
    problems += chain.consistency(groups)
    if problems:
        raise ConfigError(problems)
    flow, check = groups["flow"], groups.get("check")
    configs: dict[str, Any] = {}
    planned: list[PlannedStep] = []
    for step in chain.steps:
        if chain.left_out(step.name, flow) or (step.on_request and step.name not in sections):
            continue
        layers = [Layer("flow", step.wire(Wiring(flow, check, configs)))]
        layers += sections.get(step.name, [])
        try:
            config = stages[step.name].resolve(layers).config
        except ConfigError as error:
            problems += prefixed(error, step.name)
            configs[step.name] = _Unresolved("unresolved")
            continue
        configs[step.name] = config
        planned.append(PlannedStep(step.name, stages[step.name], config))
    if problems:
        raise ConfigError(problems)
    return Pipeline(str(path), flow, check, tuple(planned))


def prefixed(error: ConfigError, section: str) -> list[Problem]:
    """A section's problems under its name."""
    if not error.problems:
        return [Problem(section, None, str(error))]
    return [
        dataclasses.replace(problem, key=f"{section}.{problem.key}") for problem in error.problems
    ]


class _Unresolved(str):
    """Stands in for a configuration with problems, so that later steps are checked too."""

    __slots__ = ()

    def __getattr__(self, name: str) -> _Unresolved:
        return self


def _sections(file: Layer, overrides: Layer | None, chain: Chain) -> dict[str, list[Layer]]:
    names = [*chain.sections, *(step.name for step in chain.steps)]
    found: dict[str, list[Layer]] = {}
    problems = []
    for layer in (file, overrides):
        for key, value in layer.values.items() if layer else ():
            # --set flow.work=X arrives as a dotted name, a file as a nested mapping.
            name, _, rest = str(key).replace("-", "_").partition(".")
            content = {rest: value} if rest else value
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
                fix = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(names)}."
                origin = layer.origin if layer else ""
                problems.append(Problem(name, value, f"no such section (from {origin})", fix))
            elif content is not None and not isinstance(content, Mapping):
                problems.append(Problem(name, value, "must be a mapping of options"))
            else:
                origin = layer.origin if layer else ""
                found.setdefault(name, []).append(Layer(origin, dict(content or {})))
    if problems:
        raise ConfigError(problems)
    return found


def _resolve_group(
    config_class: type, name: str, sections: Mapping[str, list[Layer]], problems: list[Problem]
) -> Any:
    try:
        return resolve(config_class, sections.get(name, [])).config
    except ConfigError as error:
        problems += prefixed(error, name)
        return None
