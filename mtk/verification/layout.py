"""``mtk verify layout``: a training step in the asked layout beside the same in one process."""

from __future__ import annotations

import dataclasses
import gc
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtk.config.model import ModelConfig
from mtk.config.parallel import ParallelConfig
from mtk.config.pretrain import PretrainConfig
from mtk.errors import GateError
from mtk.launch.local import launch
from mtk.launch.process import Place
from mtk.parallel.collectives import gather_objects
from mtk.parallel.legal_layouts import name
from mtk.parallel.ranks import Ranks
from mtk.training.expert_balance import balance_names
from mtk.training.join import training_ranks
from mtk.verification.compare import Difference, compare
from mtk.verification.exchange import read_observation, write_observation
from mtk.verification.observe import Observation, observe, random_sample
from mtk.verification.prepare import tolerance_of

# How many parameters the table names.
SHOWN = 10


@dataclass(frozen=True)
class Scalars:
    """Figures of a step. balance: those of an MoE model's balance by name."""

    loss: float
    norm: float
    balance: dict[str, float]

    @classmethod
    def of(cls, observation: Observation, model: ModelConfig) -> Scalars:
        names = balance_names(model.num_experts is not None, model.moe_router_enable_expert_bias)
        named = dict(zip(names, observation.balance, strict=True))
        return cls(observation.loss, observation.norm, named)


@dataclass(frozen=True)
class LayoutProof:
    """one, ranks: the step in one process and in the layout."""

    layout: str
    world: int
    device: str
    one: Scalars
    ranks: Scalars
    difference: Difference

    @property
    def failures(self) -> list[str]:
        return self.difference.failures

    def fields(self) -> dict[str, Any]:
        """For machines."""
        found = self.difference
        return {
            "layout": self.layout,
            "ranks": self.world,
            "device": self.device,
            "one_process": vars(self.one),
            "in_layout": vars(self.ranks),
            "errors": {
                "loss": found.loss,
                "norm": found.norm,
                "balance": found.balance,
                "gradients": dict(found.gradients),
                "weights": dict(found.weights),
            },
            "tolerance": vars(found.tolerance),
            "vanishing_gradients": list(found.vanishing),
            "failures": found.failures,
            "equal": not found.failures,
        }

    def lines(self) -> list[str]:
        """For people."""
        found, limit = self.difference, self.difference.tolerance
        width = max(len(name) for name in (*found.gradients, "gradient norm"))
        head = f"{'':<{width}}  {'one process':>14}  {'layout':>14}  {'error':>8}  tolerance"
        lines = [f"layout {self.layout}: {self.world} ranks on {self.device}", "", head]
        rows = [
            ("loss", self.one.loss, self.ranks.loss, found.loss, limit.loss),
            ("gradient norm", self.one.norm, self.ranks.norm, found.norm, limit.norm),
        ]
        for key, value in self.one.balance.items():
            other = self.ranks.balance[key]
            error = abs(other - value) / max(abs(value), 1e-30)
            rows.append((key, value, other, error, limit.balance))
        lines += [
            f"{what:<{width}}  {one:>14.8g}  {ranks:>14.8g}  {error:>8.1e}  {most:.1e}"
            for what, one, ranks, error, most in rows
        ]
        for what, errors, most in (
            ("gradients (share of the greatest value)", found.gradients, limit.gradient),
            ("weights after the step (difference)", found.weights, limit.weight),
        ):
            lines += ["", f"worst {what}, tolerance {most:.1e}"]
            worst = sorted(errors.items(), key=_by_error)[:SHOWN]
            lines += [f"  {key:<{width}}  {error:.1e}" for key, error in worst]
        if found.vanishing:
            lines.append(f"weights not compared (no gradient): {', '.join(found.vanishing)}")
        lines += [f"copies differ after the step: {text}" for text in found.drifted]
        return [*lines, "", f"verdict: {'DIFFERENT' if found.failures else 'equal'}"]


def _by_error(item: tuple[str, float]) -> tuple[float, str]:
    """Worst first; what is not a number before all."""
    key, error = item
    return (-error if error == error else float("-inf"), key)


def prove_layout(config: PretrainConfig, steps: int, device: str) -> LayoutProof:
    """Run ``config`` on ``config.parallel.nproc`` new ranks, and in one process.

    device: ``cpu`` or ``cuda``. Raises GateError when the ranks do not even agree with each
    other, and what a failing rank raises.
    """
    with tempfile.TemporaryDirectory(prefix="mtk-verify-") as folder:
        proof: LayoutProof = launch(
            prove_on_rank,
            (config, steps, folder),
            config.parallel.nproc,
            device=device,
            timeout=config.parallel.timeout_seconds,
        )
    return proof


def prove_on_rank(
    place: Place, config: PretrainConfig, steps: int, folder: str
) -> LayoutProof | None:
    """One rank's part; the first one then runs the whole model and compares."""
    sample = random_sample(config, config.runtime.seed)
    with training_ranks(place, config) as ranks:
        write_observation(observe(config, sample, ranks, steps), _file(folder, place.rank))
        gather_objects(None, ranks.world, "verify.written")
    if place.rank:
        return None
    gc.collect()
    one = observe(in_one_process(config), sample, Ranks(device=place.device), steps)
    found = [read_observation(_file(folder, rank)) for rank in range(place.world)]
    return _proof(config, place, one, found, steps)


def in_one_process(config: PretrainConfig) -> PretrainConfig:
    """The same run without any technique, recomputation included."""
    return dataclasses.replace(config, parallel=ParallelConfig())


def _file(folder: str, rank: int) -> Path:
    return Path(folder, f"rank{rank}.safetensors")


def _proof(
    config: PretrainConfig,
    place: Place,
    one: Observation,
    ranks: list[Observation],
    steps: int,
) -> LayoutProof:
    try:
        difference = compare(one, ranks, tolerance_of(config, steps))
    except ValueError as error:
        raise GateError(f"{name(config.parallel)}: {error}.") from error
    return LayoutProof(
        name(config.parallel),
        place.world,
        place.device.type,
        Scalars.of(one, config.model),
        Scalars.of(ranks[0], config.model),
        difference,
    )
