"""What :class:`serving.torch_engine.TorchEngine` computes with: here, or on several ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mtk.models.gpt import GPT
from serving.decoding import SequenceDecoder
from serving.encoder_prompt import EncoderPrompt
from serving.generation import decoder_for
from serving.paged.runner import Runner


@dataclass(frozen=True)
class Parts:
    """decoder: makes decoders with caches of their own. runner: makes that of a paged cache."""

    decoder: Callable[[GPT, EncoderPrompt | None], SequenceDecoder] = decoder_for
    runner: Callable[..., Runner] = Runner


ALONE = Parts()
