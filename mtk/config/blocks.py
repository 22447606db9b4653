"""How the parts of a decoder are put together, and the rules of these options."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mtk.config.schema import option
from mtk.errors import Problem

if TYPE_CHECKING:
    from mtk.config.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """Part of :class:`mtk.config.model.ModelConfig`."""

    use_parallel_residual: bool = option(
        False, help="Attention and MLP of a layer both read its input, as in GPT-NeoX and GPT-J."
    )
    apply_layernorm_1p: bool = option(
        False, help="Norms multiply by 1 + weight, and their weights start at 0, as in Gemma."
    )
    scale_embeddings: bool = option(
        False, help="Multiply token embeddings by the square root of hidden-size, as in Gemma."
    )
    embedding_layernorm: bool = option(False, help="Norm after the embedding, as in BLOOM.")
    add_mlp_bias: bool = option(False, help="Biases in the MLP even if not elsewhere.")


def block_problems(model: ModelConfig) -> Iterator[Problem]:
    """Violations of these options."""
    if model.add_mlp_bias and model.add_bias_linear:
        rule = "add_bias_linear puts biases there already"
        fix = "Leave it out, or add --disable-bias-linear."
        yield Problem("add_mlp_bias", True, rule, fix)
    if model.add_mlp_bias and model.num_experts is not None:
        rule = "experts have no biases (they are one grouped matrix multiply)"
        yield Problem("add_mlp_bias", True, rule, "Leave it out.")
    if model.family == "gpt":
        return
    for name in BlockOptions.__dataclass_fields__:
        if getattr(model, name):
            rule = f"family {model.family} has nothing of the kind here"
            yield Problem(name, True, rule, "Leave it out.")
