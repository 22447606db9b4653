"""``transformers.generate`` of the same model, as a yardstick: a static cache, compiled where it
can be, greedy, prompts and lengths as :func:`serving.decode_speed.measure_decode` has them."""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CACHE = "static"


def missing() -> str:
    """Why there is nothing to compare with; "" where there is."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed: pip install -c constraints.txt -e '.[hf]'"
    return ""


@dataclass(frozen=True)
class Speed:
    """As :class:`serving.decode_speed.DecodeFigures` has them."""

    prefill_seconds: float
    step_seconds: Sequence[float]
    tokens: Sequence[Sequence[int]]
    cache: str = CACHE

    @property
    def step_tokens(self) -> float:
        return len(self.tokens)


def speed_of(started: float, ends: Sequence[float], tokens: Sequence[Sequence[int]]) -> Speed:
    """From the time at which each column of tokens was known."""
    steps = [later - earlier for earlier, later in pairwise(ends)]
    return Speed(ends[0] - started, steps, tokens)


class Generate:
    """A model of transformers. compiled: None decides by device (CUDA only). encoder: prompts go
    through one, as in T5.

    how: what the last measurement ran, in words.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype,
        device: str,
        compiled: bool | None,
        encoder: bool = False,
    ) -> None:
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind = AutoModelForSeq2SeqLM if encoder else AutoModelForCausalLM
            model = kind.from_pretrained(folder, dtype=dtype)
        self._model: Any = model.eval().to(device)
        self._encoder = encoder
        self._device = torch.device(device)
        self._compiled = self._device.type == "cuda" if compiled is None else compiled
        self.how = ""

    @torch.inference_mode()
    def measure(self, prompts_: Sequence[Sequence[int]], new_tokens: int) -> Speed:
        prompts = torch.tensor(prompts_, device=self._device)
        self._model.generation_config = self._greedy(new_tokens)
        clock = _Clock(self._device)
        clock.wait()
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = self._model.generate(
                prompts, attention_mask=torch.ones_like(prompts), logits_processor=[clock]
            )
        ran = getattr(self._model, "_compiled_call", None) is not None
        self.how = f"{CACHE} cache, {'compiled' if ran else 'not compiled'}"
        # What a decoder behind an encoder writes begins with its start token.
        begun = 1 if self._encoder else prompts.shape[1]
        return speed_of(started, clock.ends, found[:, begun:].tolist())

    def _greedy(self, new_tokens: int) -> Any:
        """No end but the length, and nothing that changes logits."""
        from transformers import CompileConfig, GenerationConfig

        given: dict[str, Any] = {"disable_compile": True}
        start = getattr(self._model.config, "decoder_start_token_id", None)
        own = {} if start is None else {"decoder_start_token_id": start}
        if self._compiled:
            config = CompileConfig()
            # Otherwise it is compiled on accelerators only.
            config._compile_all_devices = True
            given = {"compile_config": config}
        return GenerationConfig(
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            cache_implementation=CACHE,
            **given,
            **own,
        )


class _Clock:
    """Sees the logits of every column of tokens when they are there, as a processor of logits
    does; the first ones tell that the prompts have been read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.ends: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        del input_ids
        self.ends.append(self.now())
        return scores

    def now(self) -> float:
        self.wait()
        return time.perf_counter()

    def wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
