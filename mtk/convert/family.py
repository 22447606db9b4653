"""What a foreign model family is to the converter, and careful reading of config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from mtk.config import make
from mtk.config.model import ModelConfig
from mtk.convert.mapping import Rename, WeightTable
from mtk.errors import ConfigError, ConversionError

T = TypeVar("T", int, float, bool, str)


@dataclass(frozen=True)
class Family:
    """One row of the table of families; adding a family is adding one of these.

    model_type, architecture: as in ``config.json``. blocks: submodule that lists the
    layers in the transformers class. prefix: what some published files leave out in
    front of names. reasons(config): ALL reasons why a native model cannot be
    expressed, empty if it can. to_config / from_config: ``config.json`` both ways.
    weights(config): the table of weights. linears: name endings of weights that are
    plain ``nn.Linear`` there, i.e. what quantisers treat; empty if they are not. patterns:
    ``reasons`` knows models whose layers follow a pattern; to all others they are refused.
    """

    model_type: str
    architecture: str
    blocks: str
    prefix: str
    reasons: Callable[[ModelConfig], list[str]]
    to_config: Callable[[ModelConfig], dict[str, Any]]
    from_config: Callable[[ForeignConfig], ModelConfig]
    weights: Callable[[ModelConfig], WeightTable]
    linears: tuple[str, ...] = ()
    patterns: bool = False


class ForeignConfig:
    """``config.json`` with every complaint collected, so that all are reported at once."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data = data
        self.where = where
        self.complaints: list[str] = []

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The value of ``key``; absent or null gives the default, or a complaint."""
        value = self.data.get(key)
        if value is None:
            if default is None:
                self.complaints.append(f"{key} is missing")
                return kind(1)
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return kind(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            self.complaints.append(f"{key} = {value!r} is not of type {kind.__name__}")
            return default if default is not None else kind(1)
        return value

    def require(self, key: str, allowed: tuple[Any, ...], why: str) -> None:
        """Complain unless ``key`` is absent or one of ``allowed``."""
        if key in self.data and self.data[key] not in allowed:
            self.complaints.append(f"{key} = {self.data[key]!r}: {why}")

    def training_length(self, positions: int) -> int:
        """What :func:`training_length` wrote, else all positions."""
        own = self.data.get("mtk")
        length = own.get("seq_length") if isinstance(own, dict) else None
        return length if isinstance(length, int) and 1 <= length <= positions else positions

    def model(self, **values: Any) -> ModelConfig:
        """The native configuration. Raises ConversionError with all complaints."""
        if not self.complaints:
            try:
                return make(ModelConfig, **values)
            except ConfigError as error:
                self.complaints += [str(problem) for problem in error.problems] or [str(error)]
        listed = "\n".join(f"  - {complaint}" for complaint in self.complaints)
        raise ConversionError(f"{self.where} describes a model mtk cannot hold:\n{listed}")


def training_length(config: ModelConfig) -> dict[str, Any]:
    """The length a model was trained at, where it accepts more: other readers pass over it."""
    if config.seq_length == config.positions:
        return {}
    return {"mtk": {"seq_length": config.seq_length}}


def linear(native: str, foreign: str, *, bias: bool, rule: type[Rename] = Rename) -> list[Rename]:
    """Rules of a linear layer: its weight (maybe transposed) and, if there is one, its bias."""
    rules: list[Rename] = [rule(f"{native}.weight", f"{foreign}.weight")]
    if bias:
        rules.append(Rename(f"{native}.bias", f"{foreign}.bias"))
    return rules
