"""Training samples of a causal language model, after Megatron-core's GPTDataset."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mtk.data.gpt_indices import (
    GPTIndices,
    IndexPlan,
    IntArray,
    Order,
    build_indices,
    plan_indices,
)
from mtk.data.id_check import check_ids, read_piece
from mtk.data.index_cache import IndexCache, index_digest
from mtk.data.token_source import Piece, TokenSource
from mtk.errors import DataError

EXTRA_TOKEN = 1  # the last token of a sample is only a label


class GPTDataset:
    """Windows of ``sequence_length`` + 1 tokens over shuffled documents.

    source: the tokens. documents: sequence indices of this split. num_samples: how many are
    needed at least (epochs are added until they suffice); None is one epoch. seed, order: see
    :mod:`mtk.data.gpt_indices`. eod: end-of-document id, needed with ``eod_mask_loss``: no loss
    where the *input* token is eod, i.e. on the first token of the next document. cache: where
    the index arrays are kept; None keeps them in memory. vocab_size: ids from there on are
    refused when they are read. drop_last: leave out a last sample that is not full (otherwise
    it is padded with id 0 and no loss). name: of the dataset, in messages.

    Raises DataError if not a single sample can be made.
    """

    def __init__(
        self,
        source: TokenSource,
        documents: IntArray,
        sequence_length: int,
        num_samples: int | None,
        seed: int,
        order: Order = "epochs",
        eod: int | None = None,
        eod_mask_loss: bool = False,
        cache: IndexCache | None = None,
        *,
        vocab_size: int | None = None,
        drop_last: bool = True,
        name: str = "dataset",
    ) -> None:
        if eod_mask_loss and eod is None:
            raise ValueError("eod_mask_loss needs the eod id")
        self.name = name
        self.sequence_length = sequence_length
        self._source = source
        self._masked = eod if eod_mask_loss else None
        self._vocab_size = vocab_size
        lengths = source.sizes[documents]
        tokens = int(lengths.sum(dtype=np.int64))
        if tokens < 1 + EXTRA_TOKEN:
            raise DataError(f"{name}: {len(documents)} sequences hold {tokens} tokens: no sample.")
        self.plan: IndexPlan = plan_indices(
            tokens, sequence_length, num_samples, order=order, drop_last=drop_last
        )
        if not self.plan.samples:
            raise DataError(
                f"{name}: {len(documents)} sequences hold {tokens} tokens, fewer than one sample "
                f"of {sequence_length} + 1. Lower --seq-length or give more data."
            )
        self._indices = self._load_or_build(documents, lengths, seed, cache)

    def __len__(self) -> int:
        """All samples of the epochs begun; at least ``num_samples``."""
        return self.plan.samples

    def __getitem__(self, k: int) -> dict[str, npt.NDArray[np.generic]]:
        """Sample ``k``: ``tokens`` int64 [S], ``labels`` int64 [S] (the tokens one further),
        ``loss_mask`` float32 [S]. Positions are 0..S-1 and not stored.

        Raises DataError for ids outside the vocabulary and unreadable data.
        """
        text = self.token_ids(k)
        valid = len(text) - EXTRA_TOKEN
        if valid < self.sequence_length:
            text = np.pad(text, (0, self.sequence_length - valid))
        tokens, labels = text[:-1].copy(), text[1:].copy()
        loss_mask = np.ones(self.sequence_length, dtype=np.float32)
        loss_mask[valid:] = 0.0
        if self._masked is not None:
            loss_mask[tokens == self._masked] = 0.0
        return {"tokens": tokens, "labels": labels, "loss_mask": loss_mask}

    def token_ids(self, k: int) -> npt.NDArray[np.int64]:
        """The ``sequence_length`` + 1 ids of sample ``k``; fewer only if it is not full."""
        parts = []
        for piece in self.documents_of(k):
            part = read_piece(self._source, piece, self.name)
            if self._vocab_size is not None:
                check_ids(part, piece, self._source, self.name, self._vocab_size)
            parts.append(part)
        return np.concatenate(parts).astype(np.int64)

    def documents_of(self, k: int) -> list[Piece]:
        """The parts of sequences that sample ``k`` is made of, in order."""
        if not 0 <= k < len(self):
            raise IndexError(f"sample {k} of {len(self)}")
        j = int(self._indices.shuffle[k])
        (first, begin), (last, end) = self._indices.sample[j : j + 2].tolist()
        pieces = []
        for position in range(first, last + 1):
            sequence = int(self._indices.document[position])
            offset = begin if position == first else 0
            stop = end + EXTRA_TOKEN if position == last else int(self._source.sizes[sequence])
            if stop > offset:
                pieces.append(Piece(sequence, offset, stop - offset))
        return pieces

    def source_of(self, k: int) -> str:
        del k
        return self.name

    def _load_or_build(
        self,
        documents: IntArray,
        lengths: npt.NDArray[np.int32],
        seed: int,
        cache: IndexCache | None,
    ) -> GPTIndices:
        def build() -> dict[str, IntArray]:
            return vars(build_indices(self._source.sizes, documents, seed, self.plan))

        if cache is None:
            return GPTIndices(**build())
        description = {
            "order": self.plan.order,
            "seed": seed,
            "sequence_length": self.sequence_length,
            "extra_token": EXTRA_TOKEN,
            "stretches": list(self.plan.stretches),
            "samples": self.plan.samples,
            # The arrays depend on nothing else of the data, wherever it lies.
            "documents": index_digest(documents),
            "lengths": index_digest(lengths),
            "longest": int(self._source.sizes.max(initial=0)),
        }
        return GPTIndices(**cache.load_or_build("gpt", description, build))
