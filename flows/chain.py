"""A chain of steps as data: what a flow's YAML file may hold, and how it is wired."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mtk.errors import Problem
from stages.registry import STAGES, Stage


class FlowSettings(Protocol):
    """What the section ``flow`` of every chain has."""

    @property
    def work(self) -> str: ...
    @property
    def leave_out(self) -> tuple[str, ...]: ...
    @property
    def retries(self) -> int: ...
    @property
    def retry_delay(self) -> float: ...


@dataclass(frozen=True)
class Wiring:
    """What a step can be wired from. flow, check: those sections; configs: of the earlier steps,
    by step name."""

    flow: Any
    check: Any
    configs: Mapping[str, Any]

    def below(self, name: str) -> str:
        return str(Path(self.flow.work) / name)


@dataclass(frozen=True)
class Step:
    """One link of the chain. stage: (group, name) in the table of stages. on_request: it runs
    only where the file has a section for it."""

    name: str
    stage: tuple[str | None, str]
    wire: Callable[[Wiring], dict[str, Any]]
    on_request: bool = False


@dataclass(frozen=True)
class Chain:
    """Steps in order. sections: configuration class of every section that is no step, ``flow``
    among them. left_out: whether a step is not run, by the section ``flow``. consistency: rules
    that need several sections."""

    steps: Sequence[Step]
    sections: Mapping[str, type]
    left_out: Callable[[str, Any], bool]
    consistency: Callable[[Mapping[str, Any]], list[Problem]]

    def stages(self) -> dict[str, Stage]:
        """Every step's stage by step name. Raises KeyError for one that is not in the table."""
        table = {(stage.group, stage.name): stage for stage in STAGES}
        return {step.name: table[step.stage] for step in self.steps}
