"""Micro-batches as tensors, read ahead of the training loop by one thread.

Legend of shapes: B samples of a micro-batch, S tokens of a sample.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from mtk.data.packing import Packing
from mtk.data.token_source import SampleDataset


@dataclass(frozen=True)
class MicroBatch:
    """tokens_BS, labels_BS: int64; loss_mask_BS: float32, 0 where a label does not count.
    indices_B: positions in the dataset's order, for the data audit. documents_BS, positions_BS:
    int64, as :class:`~mtk.data.packing.Packing` says, or from samples that have ``documents``
    and ``positions`` themselves; None where one forward pass goes over the whole sample.
    extra: whatever else the samples have, by its name there."""

    tokens_BS: torch.Tensor
    labels_BS: torch.Tensor
    loss_mask_BS: torch.Tensor
    indices_B: tuple[int, ...]
    documents_BS: torch.Tensor | None = None
    positions_BS: torch.Tensor | None = None
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def uncount(self, begin: int) -> None:
        """Make the samples from ``begin`` on count for nothing: they only fill the batch."""
        self.loss_mask_BS[begin:] = 0.0
        for name, value in _UNCOUNTED.items():
            if name in self.extra:
                self.extra[name][begin:] = value


# What a sample may have besides extras.
_FIELDS = frozenset(("tokens", "labels", "loss_mask", "documents", "positions"))
# What an extra is for a sample that does not count.
_UNCOUNTED = {"order": -1, "counted": 0}


@dataclass(frozen=True)
class _End:
    """What the thread puts last: why it ended (None: nothing is left)."""

    error: BaseException | None


class BatchLoader:
    """Iterator over micro-batches in the order of ``indices``.

    indices: positions [B] of each micro-batch, e.g. from
    :func:`mtk.data.sampler.micro_batches`. prefetch: micro-batches held ready at most.
    pin_memory: page-locked tensors for asynchronous copies (default: if there is CUDA).
    packing: what the documents inside a sample mean; None: nothing.

    An error of the dataset is raised where the batch would have come, with its own traceback.
    Use as a context manager, or call :meth:`close`.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        indices: Iterable[npt.NDArray[np.int64]],
        *,
        prefetch: int = 8,
        pin_memory: bool | None = None,
        packing: Packing | None = None,
    ) -> None:
        if prefetch < 1:
            raise ValueError("prefetch must be at least 1")
        self._dataset = dataset
        self._indices = iter(indices)
        self._pin = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._packing = packing
        self._ready: queue.Queue[MicroBatch | _End] = queue.Queue(maxsize=prefetch)
        self._closing = threading.Event()
        self._end: _End | None = None
        # A daemon: a loader that nobody closed must not keep a failed program alive.
        self._thread = threading.Thread(target=self._work, name="mtk-batches", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[MicroBatch]:
        return self

    def __next__(self) -> MicroBatch:
        if self._closing.is_set():
            raise ValueError("the loader is closed")
        item = self._end or self._ready.get()
        if isinstance(item, MicroBatch):
            return item
        self._end = item
        if item.error is not None:
            raise item.error
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading and wait for the thread; may be called more than once."""
        self._closing.set()
        while self._thread.is_alive():
            self._drain()  # the thread may be waiting for room in the queue
            self._thread.join(timeout=0.05)
        self._drain()

    def _drain(self) -> None:
        while True:
            try:
                self._ready.get_nowait()
            except queue.Empty:
                return

    def _work(self) -> None:
        error: BaseException | None = None
        try:
            for positions in self._indices:
                if self._closing.is_set():
                    return
                self._ready.put(self._batch(positions))
        except BaseException as caught:  # all of it belongs to the consumer
            error = caught
        self._ready.put(_End(error))

    def _batch(self, positions: npt.NDArray[np.int64]) -> MicroBatch:
        indices = tuple(int(k) for k in positions)
        samples = [self._dataset[k] for k in indices]
        tokens_BS = _stack(samples, "tokens")
        packing = self._packing
        documents_BS = None if packing is None else packing.documents(tokens_BS)
        if "documents" in samples[0]:
            documents_BS = _stack(samples, "documents")
        positions_BS = None if packing is None else packing.position_ids(tokens_BS)
        if "positions" in samples[0]:
            positions_BS = _stack(samples, "positions")
        return MicroBatch(
            self._pinned(tokens_BS),
            self._pinned(_stack(samples, "labels")),
            self._pinned(_stack(samples, "loss_mask")),
            indices,
            None if documents_BS is None else self._pinned(documents_BS),
            None if positions_BS is None else self._pinned(positions_BS),
            {k: self._pinned(_stack(samples, k)) for k in samples[0] if k not in _FIELDS},
        )

    def _pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory() if self._pin else tensor


def _stack(samples: list[dict[str, npt.NDArray[np.generic]]], key: str) -> torch.Tensor:
    """One row a sample, or several where a sample has several sequences [C, S]."""
    found = [sample[key] for sample in samples]
    return torch.from_numpy((np.concatenate if found[0].ndim == 2 else np.stack)(found))
