"""The options of a model whose sizes a checkpoint decides: none of them has to be given."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mtk.config.model import ModelConfig
from mtk.config.positions import SCALING_OPTIONS
from mtk.config.resolve import make
from mtk.config.schema import OptionSpec, hints
from mtk.errors import ConfigError, Problem

# What may differ from the checkpoint: no shape and no meaning of a weight depends on it.
FREE = (
    "seq_length",
    "decoder_seq_length",
    "hidden_dropout",
    "attention_dropout",
    "init_method_std",
    "mamba_chunk_size",
    "moe_router_load_balancing_type",
    "moe_router_bias_update_rate",
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
    "moe_expert_capacity_factor",
)

# What training for longer sequences changes on purpose, where no weight belongs to a position.
LONGER = ("max_position_embeddings", "rotary_base", "rope_scaling_type", *SCALING_OPTIONS)


def _free(saved: ModelConfig) -> tuple[str, ...]:
    return FREE if saved.position_embedding_type == "learned" else FREE + LONGER


def _optional(source: type) -> type:
    """A dataclass with the visible options of ``source``, all of them None unless given."""
    fields: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(source):
        spec: OptionSpec | None = field.metadata.get("option")
        if spec is not None and not spec.hidden:
            open_spec = dataclasses.replace(spec, required=False)
            value = dataclasses.field(default=None, kw_only=True, metadata={"option": open_spec})
            fields.append((field.name, hints(source)[field.name] | None, value))
    made = dataclasses.make_dataclass("GivenModel", fields, frozen=True)
    made.__module__ = __name__  # configurations are sent to ranks
    return made


if TYPE_CHECKING:

    class GivenModel(ModelConfig):
        """As :class:`ModelConfig`, but any value may be None."""

else:
    GivenModel = _optional(ModelConfig)


def complete(given: GivenModel, saved: ModelConfig, checkpoint: str) -> ModelConfig:
    """The checkpoint's model with what of ``given`` may differ.

    Raises ConfigError naming both values of every option that disagrees, and for values that
    the model does not allow.
    """
    problems = list(_disagreements(given, saved, checkpoint))
    if problems:
        raise ConfigError(problems)
    free = _free(saved)
    values = {name: value for name, value in _given(given).items() if name in free}
    try:
        return make(ModelConfig, **{**vars(saved), **values})
    except ConfigError as error:
        keyed = [dataclasses.replace(p, key=f"model.{p.key}") for p in error.problems]
        raise ConfigError(keyed) from None


def _disagreements(given: GivenModel, saved: ModelConfig, checkpoint: str) -> Iterator[Problem]:
    for name, value in _given(given).items():
        known = getattr(saved, name)
        if name not in _free(saved) and value != known:
            rule = f"{checkpoint} has {known!r}"
            yield Problem(f"model.{name}", value, rule, "Leave it out: the checkpoint decides.")


def _given(given: GivenModel) -> dict[str, Any]:
    return {name: value for name, value in vars(given).items() if value is not None}
