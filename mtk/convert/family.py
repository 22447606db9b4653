"""What a foreign model family is to the converter, and careful reading of config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from mtk.config import make
from mtk.config.model import ModelConfig
from mtk.convert.lazy import Tensors
from mtk.convert.mapping import Rename, WeightTable
from mtk.convert.probe import CAUSAL, Probe
from mtk.errors import ConfigError, ConversionError

T = TypeVar("T", int, float, bool, str)

# Options of a model that every family has a place for, or that training alone looks at.
COMMON = frozenset(
    {
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "ffn_hidden_size",
        "moe_ffn_hidden_size",
        "kv_channels",
        "seq_length",
        "max_position_embeddings",
        "norm_epsilon",
        "hidden_dropout",
        "attention_dropout",
        "init_method_std",
        "vocab_size",
        "make_vocab_size_divisible_by",
        "untie_embeddings_and_output_weights",
        # Looked at through the biases they make: see ``bias_reasons``.
        "add_bias_linear",
        "add_qkv_bias",
        "add_attention_bias",
        "add_mlp_bias",
    }
)
# What to say of the options that are refused most.
SAYINGS = {"family": "is a decoder", "num_experts": "is dense"}


def as_they_are(tensors: Tensors, config: ModelConfig) -> Tensors:
    """The one form that most families are written in."""
    del config
    return tensors


def as_it_is(foreign: dict[str, Any], tensors: Tensors) -> dict[str, Any]:
    """The one meaning that most ``config.json`` have."""
    del tensors
    return foreign


@dataclass(frozen=True)
class Family:
    """One row of the table of families; adding a family is adding one of these.

    model_type, architecture: as in ``config.json``. blocks: submodules (parted by spaces)
    that list the layers in the transformers class. prefix: what some published files leave
    out in front of names. reasons(config): ALL reasons why a native model cannot be
    expressed, empty if it can. to_config / from_config: ``config.json`` both ways.
    weights(config): the table of weights. linears: name endings of weights that are
    plain ``nn.Linear`` there, i.e. what quantisers treat; empty if they are not. probe: how
    the parity check runs models of the family. outside: names that never have the prefix.
    patterns: ``reasons`` knows models whose layers follow a pattern; to all others they are
    refused. classes: others of transformers that ``architectures`` may name and that read the
    same files. aliases: keys that transformers takes for the family's own ones. amended: what
    ``config.json`` means, where it takes a look at the weights to know.
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
    probe: Probe = CAUSAL
    outside: tuple[str, ...] = ("lm_head.",)
    spelling: Callable[[Tensors, ModelConfig], Tensors] = as_they_are
    patterns: bool = False
    classes: tuple[str, ...] = ()
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    amended: Callable[[dict[str, Any], Tensors], dict[str, Any]] = as_it_is


def reasons_against(
    config: ModelConfig, name: str, takes: Mapping[str, tuple[tuple[Any, ...], str]]
) -> list[str]:
    """Options of ``config`` that family ``name`` has no counterpart for.

    takes: for options the family knows, the values it can express and what to say of others;
    all other options must have their defaults, so that one added later is never dropped.
    """
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in COMMON:
            continue
        values, saying = takes.get(
            field.name, ((field.default,), SAYINGS.get(field.name, "has nothing of the kind"))
        )
        if value not in values:
            found.append(f"{field.name} = {value}: {name} {saying}")
    return found


def bias_reasons(
    config: ModelConfig, name: str, allowed: tuple[tuple[bool, bool, bool], ...]
) -> list[str]:
    """Whether the biases of query/key/value, attention output and MLP are ``allowed``."""
    own = (config.qkv_bias, config.attention_output_bias, config.mlp_bias)
    if own in allowed:
        return []
    places = ("query/key/value", "attention output", "MLP")
    legal = " or ".join(_listed(places, each) for each in allowed)
    options = ("add_bias_linear", "add_qkv_bias", "add_attention_bias", "add_mlp_bias")
    given = ", ".join(f"{each} = {getattr(config, each)}" for each in options)
    return [f"{given}: biases in {_listed(places, own)}; {name} has them in {legal}"]


def _listed(places: tuple[str, ...], flags: tuple[bool, ...]) -> str:
    chosen = [place for place, flag in zip(places, flags, strict=True) if flag]
    return " + ".join(chosen) or "no part"


def bias_options(*, qkv: bool, output: bool, mlp: bool) -> dict[str, bool]:
    """Native options for biases in these parts; ``output`` (of attention) needs ``qkv``."""
    everywhere = qkv and output and mlp
    return {
        "add_bias_linear": everywhere,
        "add_qkv_bias": qkv and not output,
        "add_attention_bias": qkv and output and not everywhere,
        "add_mlp_bias": mlp and not everywhere,
    }


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


def own_keys(foreign: Mapping[str, Any], aliases: Mapping[str, str], where: str) -> dict[str, Any]:
    """``config.json`` with the family's own keys in place of their ``aliases``; null is absent.
    Raises ConversionError where both are there and differ."""
    found = dict(foreign)
    for alias, key in aliases.items():
        value = found.pop(alias, None)
        if value is None:
            continue
        if found.get(key) not in (None, value):
            raise ConversionError(
                f"{where}: {alias} = {value!r} and {key} = {found[key]!r} are the same setting. "
                f"Leave one of them out."
            )
        found[key] = value
    return found


def first_architecture(foreign: Mapping[str, Any]) -> str | None:
    """The class that ``config.json`` names first, if any."""
    stated = foreign.get("architectures")
    return str(stated[0]) if isinstance(stated, list) and stated else None


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
