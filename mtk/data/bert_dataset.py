"""Training samples of BERT, after Megatron-core's BERTMaskedWordPieceDataset.

Masked tokens (Devlin et al. 2019) in n-grams of whole words, and two segments that follow each
other or were swapped (sentence order, Lan et al. 2020; not the next sentence of BERT's paper).
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from mtk.data.masking import BERT_MASKING, Masking, choose_spans, mask_budget, words_of
from mtk.data.sentence_dataset import Sample, SentenceDataset, padded

Ids = npt.NDArray[np.int64]
MASKED = 0.8  # of the chosen tokens; half of the others become any token, the rest stays


class BertDataset(SentenceDataset):
    """``[CLS] A [SEP] B [SEP]``, or ``[CLS] A [SEP]`` without pairs.

    The vocabulary needs cls, sep and mask.
    """

    masking: ClassVar[Masking] = BERT_MASKING
    special_tokens: ClassVar[int] = 3  # room for them is kept without pairs too

    @property
    def least_sentences(self) -> int:
        return 2 if self.rules.pairs else 1

    def __getitem__(self, k: int) -> Sample:
        """Sample ``k``: ``tokens`` int64 [S], some of them masked; ``types`` int64 [S], 1 for B
        and the SEP after it; ``labels`` int64 [S] and ``loss_mask`` float32 [S], the ids before
        masking and 1 where masked; ``documents`` int64 [S], 1 for padding; with pairs ``order``
        int64 scalar, 1 where A and B were swapped."""
        state, length = self.state_of(k), self.rules.length
        first, second, swapped = self._segments(self.sentences_of(k), state)
        first, second = shortened(first, second, self.target_of(k), state)
        text, types = self._joined(first, second)
        tokens, labels, loss_mask = self._masked(text, self.target_of(k), state)
        sample: Sample = {
            "tokens": padded(tokens, length, self.vocabulary.pad),
            "types": padded(types, length),
            "labels": padded(labels, length),
            "loss_mask": np.pad(loss_mask, (0, length - len(text))),
            "documents": padded(np.zeros_like(text), length, 1),
        }
        if self.rules.pairs:
            sample["order"] = np.array(swapped, dtype=np.int64)
        return sample

    def _segments(
        self, sentences: list[Ids], state: np.random.RandomState
    ) -> tuple[Ids, Ids, bool]:
        """A, B and whether they were swapped; B is empty without pairs."""
        nothing = np.empty(0, dtype=np.int64)
        if not self.rules.pairs:
            return np.concatenate(sentences), nothing, False
        pivot = state.randint(low=1, high=len(sentences)) if len(sentences) > 2 else 1
        first, second = np.concatenate(sentences[:pivot]), np.concatenate(sentences[pivot:])
        swapped = bool(state.random_sample() < 0.5)
        return (second, first, True) if swapped else (first, second, False)

    def _joined(self, first: Ids, second: Ids) -> tuple[Ids, Ids]:
        cls, sep = self.vocabulary.cls, self.vocabulary.sep
        assert cls is not None and sep is not None
        parts: list[Ids | list[int]] = [[cls], first, [sep]]
        if len(second):
            parts += [second, [sep]]
        text = np.concatenate(parts).astype(np.int64)
        types = np.zeros_like(text)
        types[len(first) + 2 :] = 1
        return text, types

    def _masked(
        self, text: Ids, target: int, state: np.random.RandomState
    ) -> tuple[Ids, Ids, npt.NDArray[np.float32]]:
        """Tokens, labels and loss mask, each as long as ``text``."""
        mask, ids, tokens = self.vocabulary.mask, self.vocabulary.ids, text.copy()
        assert mask is not None

        def replace(position: int) -> None:
            if state.random_sample() < MASKED:
                tokens[position] = mask
            elif state.random_sample() >= 0.5:
                tokens[position] = ids[state.randint(0, len(ids))]

        words = words_of(text, self.vocabulary)
        budget = mask_budget(self.rules.mask_prob, len(text), target)
        spans = choose_spans(words, self.masking, budget, state, replace)
        labels = np.zeros_like(text)
        loss_mask = np.zeros(len(text), dtype=np.float32)
        for span in spans:
            labels[span] = text[span]
            loss_mask[span] = 1.0
        return tokens, labels, loss_mask


def shortened(
    first: Ids, second: Ids, target: int, state: np.random.RandomState
) -> tuple[Ids, Ids]:
    """Both segments cut to ``target`` tokens together, one token at a time: always from the
    longer one (from the second where they are equal), from its front or its end by chance."""
    excess = len(first) + len(second) - target
    if excess <= 0:
        return first, second
    bounds = ([0, len(first)], [0, len(second)])
    for front in (state.random_sample(excess) < 0.5).tolist():
        sizes = [end - begin for begin, end in bounds]
        longer = bounds[0] if sizes[0] > sizes[1] else bounds[1]
        if front:
            longer[0] += 1
        else:
            longer[1] -= 1
    (begin, end), (start, stop) = bounds
    return first[begin:end], second[start:stop]
