"""How both sides of a parity check are run on the same fixed tokens.

Shape suffixes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Probe(Protocol):
    """native, foreign: the logits [B, S, V] of mtk's module and of transformers'. states: what
    a block returned, without places that the two may treat differently."""

    def native(self, model: Any, tokens_BS: Tensor) -> Tensor: ...
    def foreign(self, model: nn.Module, tokens_BS: Tensor) -> Tensor: ...
    def states(self, x_BSE: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class CausalProbe:
    """A decoder reads the tokens."""

    def native(self, model: Any, tokens_BS: Tensor) -> Tensor:
        logits: Tensor = model(tokens_BS)
        return logits

    def foreign(self, model: nn.Module, tokens_BS: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=tokens_BS, use_cache=False).logits
        return logits

    def states(self, x_BSE: Tensor) -> Tensor:
        return x_BSE


@dataclass(frozen=True)
class SegmentInputs:
    """Tokens as two segments, the last places of the second being padding.

    padding: 0 for a real token, 1 for padding; real: how many are real.
    """

    types_BS: Tensor
    padding_BS: Tensor
    real: int

    @classmethod
    def of(cls, tokens_BS: Tensor, kinds: int = 2) -> SegmentInputs:
        """kinds: of segments that the model tells apart; where it is one, both are of it."""
        length = tokens_BS.shape[1]
        places = torch.arange(length).expand_as(tokens_BS)
        real = length - max(1, length // 8)
        second = (places >= length // 3).long() * min(kinds - 1, 1)
        return cls(second, (places >= real).long(), real)


def with_order(logits_BSV: Tensor, order_B2: Tensor | None, real: int) -> Tensor:
    """Logits of real places; the logits of the segments' order stand in the last place, which
    is padding and has none."""
    out_BSV = logits_BSV.clone()
    out_BSV[:, real:] = 0.0
    if order_B2 is not None:
        out_BSV[:, -1, :2] = order_B2
    return out_BSV


@dataclass(frozen=True)
class SegmentProbe:
    """An encoder reads two padded segments; both heads are compared, or that of a task, whose
    logits [B, K] are those of one place."""

    def native(self, model: Any, tokens_BS: Tensor) -> Tensor:
        inputs = SegmentInputs.of(tokens_BS, model.config.num_tokentypes)
        out = model(tokens_BS, types=inputs.types_BS, documents=inputs.padding_BS)
        logits, order = out if isinstance(out, tuple) else (out, None)
        if logits.ndim == 2:
            return logits[:, None]  # type: ignore[no-any-return]
        return with_order(logits, order, inputs.real)

    def foreign(self, model: Any, tokens_BS: Tensor) -> Tensor:
        inputs = SegmentInputs.of(tokens_BS, model.config.type_vocab_size)
        given = (tokens_BS, inputs.types_BS, 1 - inputs.padding_BS)
        if type(model).__name__.endswith("ForMultipleChoice"):  # one choice
            given = (given[0][:, None], given[1][:, None], given[2][:, None])
        out = model(input_ids=given[0], token_type_ids=given[1], attention_mask=given[2])
        if "logits" in out and out.logits.ndim == 2:
            return out.logits[:, None]  # type: ignore[no-any-return]
        if hasattr(out, "prediction_logits"):
            return with_order(out.prediction_logits, out.seq_relationship_logits, inputs.real)
        return with_order(out.logits, None, inputs.real)

    def states(self, x_BSE: Tensor) -> Tensor:
        return x_BSE[:, : SegmentInputs.of(x_BSE[..., 0]).real]


@dataclass(frozen=True)
class PairInputs:
    """Tokens for an encoder, the last ones padding, and the same in reverse for a decoder."""

    decoder_BS: Tensor
    padding_BS: Tensor
    real: int

    @classmethod
    def of(cls, tokens_BS: Tensor) -> PairInputs:
        segments = SegmentInputs.of(tokens_BS)
        return cls(tokens_BS.flip(1), segments.padding_BS, segments.real)


@dataclass(frozen=True)
class PairProbe:
    """An encoder reads padded tokens, a decoder others."""

    def native(self, model: Any, tokens_BS: Tensor) -> Tensor:
        inputs = PairInputs.of(tokens_BS)
        logits: Tensor = model(tokens_BS, inputs.decoder_BS, documents=inputs.padding_BS)
        return logits

    def foreign(self, model: nn.Module, tokens_BS: Tensor) -> Tensor:
        inputs = PairInputs.of(tokens_BS)
        logits: Tensor = model(
            input_ids=tokens_BS,
            attention_mask=1 - inputs.padding_BS,
            decoder_input_ids=inputs.decoder_BS,
            use_cache=False,
        ).logits
        return logits

    def states(self, x_BSE: Tensor) -> Tensor:
        # Padding looks at padding in one, at real tokens in the other.
        return x_BSE[:, : SegmentInputs.of(x_BSE[..., 0]).real]


CAUSAL = CausalProbe()
SEGMENTS = SegmentProbe()
SEQ2SEQ = PairProbe()
# By the family of a native model.
PROBES: Mapping[str, Probe] = {"gpt": CAUSAL, "bert": SEGMENTS, "t5": SEQ2SEQ}
