"""An encoder-decoder (T5) behind what batches, beam searches and probes use of a decoder.

A prompt goes through the encoder; the decoder then begins with its start token, keeps its own
keys and values in rows as every decoder does, and looks at keys and values that were made of the
encoder's states once.

Shape suffixes: B rows, T tokens, V vocabulary, H heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mtk.models.attention import LayerCache
from mtk.models.t5 import T5
from serving.encoder_memory import EncoderMemory, Memory
from serving.kv_cache import KVCache
from serving.requests import TokenLogprob


class EncoderDecoder:
    """Implements :class:`serving.decoding.SequenceDecoder`. start: the decoder's first token."""

    def __init__(self, model: T5, start: int) -> None:
        self.model, self._start = model, start
        self.cache = PairCache(model.config.num_layers)
        self._device = model.output_weight.device

    def prefill(
        self, row: int, prompt: Sequence[int], *, score_top: int | None = None
    ) -> tuple[Tensor, list[TokenLogprob]]:
        """Encode a prompt for an empty row, unless it is there already.

        Returns the logits [V] of the first token. Raises ValueError if the prompt is to be scored:
        nothing predicts it.
        """
        if score_top is not None:
            raise ValueError("the decoder does not predict the prompt")
        memory = self.cache.read(row, tuple(prompt), lambda: self._encoded(prompt))
        positions_T = torch.zeros(1, dtype=torch.int64, device=self._device)
        mask_TT = torch.ones(1, 1, dtype=torch.bool, device=self._device)
        views = self.cache.prefill_views(row, memory)
        logits_V = self._logits([self._start], positions_T, mask_TT, views)[0]
        self.cache.lengths[row] += 1
        return logits_V, []

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each row; the logits [B, V] of the next ones."""
        lengths = self.cache.lengths
        positions_B = torch.tensor(lengths, device=self._device)
        seen_T = torch.arange(max(lengths) + 1, device=self._device)
        mask_BT = seen_T[None, :] <= positions_B[:, None]
        views = self.cache.decode_views(positions_B)
        logits_BV = self._logits(tokens, positions_B[:, None], mask_BT[:, None, None, :], views)
        self.cache.lengths[:] = [length + 1 for length in lengths]
        return logits_BV

    def _encoded(self, prompt: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        tokens_BS = torch.tensor([prompt], device=self._device)
        return self.model.kept_of(self.model.encoded(tokens_BS))

    def _logits(
        self, tokens: Sequence[int], positions: Tensor, mask: Tensor, views: Sequence[LayerView]
    ) -> Tensor:
        tokens_BT = torch.tensor(tokens, device=self._device)[:, None]
        return self.model.continued(tokens_BT, positions, mask=mask, caches=views)[:, 0]


class LayerView:
    """One layer of the decoder in one forward pass (a :class:`mtk.models.t5.DecoderCache`)."""

    def __init__(self, own: LayerCache, look: Callable[[Tensor], Tensor]) -> None:
        self._own, self._look = own, look

    def update(self, k_BGSD: Tensor, v_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        return self._own.update(k_BGSD, v_BGSD)

    def look(self, q_BHSD: Tensor, /) -> Tensor:
        return self._look(q_BHSD)


class PairCache:
    """Rows of the decoder's own keys and values, each with the prompt that it looks at."""

    def __init__(self, num_layers: int) -> None:
        self._own = KVCache(num_layers)
        self._memory = EncoderMemory(num_layers)
        self._prompts: list[Memory | None] = []

    @property
    def lengths(self) -> list[int]:
        """Tokens of the decoder held by each row, the start token among them."""
        return self._own.lengths

    @property
    def tokens(self) -> int:
        """Tokens held for all rows; a prompt that rows share counts once."""
        return self._own.tokens + self._memory.tokens

    def add_row(self) -> int:
        self._prompts.append(None)
        return self._own.add_row()

    def free_row(self, row: int) -> int:
        """Free ``row``; the last row moves into its place. Returns the row that moved."""
        memory = self._prompts[row]
        self._prompts[row] = self._prompts[-1]
        self._prompts.pop()
        if memory is not None:
            self._memory.release(memory)
        return self._own.free_row(row)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Row i becomes a copy of ``rows[i]`` (for beams)."""
        before, self._prompts = self._prompts, [self._prompts[row] for row in rows]
        for memory in self._prompts:
            if memory is not None:
                self._memory.share(memory)
        for memory in before:
            if memory is not None:
                self._memory.release(memory)
        self._own.select_rows(rows)

    def read(
        self, row: int, prompt: tuple[int, ...], encode: Callable[[], list[tuple[Tensor, Tensor]]]
    ) -> Memory:
        """Give an empty row its prompt, encoded now if nobody has it."""
        memory = self._prompts[row] = self._memory.take(prompt, encode)
        return memory

    def prefill_views(self, row: int, memory: Memory) -> list[LayerView]:
        return self._views(self._own.prefill_views(row), [memory])

    def decode_views(self, positions_B: Tensor) -> list[LayerView]:
        rows = [memory for memory in self._prompts if memory is not None]
        return self._views(self._own.decode_views(positions_B), rows)

    def _views(self, own: Sequence[object], rows: Sequence[Memory]) -> list[LayerView]:
        looks = self._memory.looks(rows)
        return [LayerView(cache, look) for cache, look in zip(own, looks, strict=True)]  # type: ignore[arg-type]
