"""Training samples of T5 (Raffel et al. 2020), after Megatron-core's T5MaskedWordPieceDataset.

Spans of whole words are replaced by sentinels; the decoder says what stood there.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from mtk.data.masking import T5_MASKING, Masking, choose_spans, mask_budget, words_of
from mtk.data.sentence_dataset import Sample, SentenceDataset, padded

Ids = npt.NDArray[np.int64]


class T5Dataset(SentenceDataset):
    """Text with sentinels for the encoder; BOS, and each sentinel with its span, for the decoder.

    The vocabulary needs bos, eos and sentinels. A span that finds no sentinel, or no room in the
    decoder, stays in the text, and so do those chosen after it (Megatron-core stops training).
    Spans that touch keep sentinels of their own.
    """

    masking: ClassVar[Masking] = T5_MASKING
    special_tokens: ClassVar[int] = 2  # Megatron-core's room, which the encoder does not use

    @property
    def least_sentences(self) -> int:
        return 1

    def __getitem__(self, k: int) -> Sample:
        """Sample ``k``: ``tokens`` int64 [S] and ``documents`` int64 [S] (1 for padding) of the
        encoder; ``decoder_tokens`` int64 [T], ``labels`` int64 [T] (the same without BOS, with
        EOS) and ``loss_mask`` float32 [T], 0 for padding."""
        text = np.concatenate(self.sentences_of(k))[: self.target_of(k)]
        spans = self._spans(text, self.target_of(k), self.state_of(k))
        encoder, decoder = self._corrupted(text, spans)
        rules, pad = self.rules, self.vocabulary.pad
        bos, eos = self.vocabulary.bos, self.vocabulary.eos
        assert bos is not None and eos is not None
        loss_mask = np.zeros(rules.decoder_length, dtype=np.float32)
        loss_mask[: len(decoder) + 1] = 1.0
        return {
            "tokens": padded(encoder, rules.length, pad),
            "documents": padded(np.zeros_like(encoder), rules.length, 1),
            "decoder_tokens": padded(np.insert(decoder, 0, bos), rules.decoder_length, pad),
            "labels": padded(np.append(decoder, eos), rules.decoder_length),
            "loss_mask": loss_mask,
        }

    def _spans(self, text: Ids, target: int, state: np.random.RandomState) -> list[list[int]]:
        """Positions of each span, from the left to the right."""
        budget = mask_budget(self.rules.mask_prob, len(text), target)
        words = words_of(text, self.vocabulary)
        kept: list[list[int]] = []
        room = self.rules.decoder_length - 1
        for span in choose_spans(words, self.masking, budget, state):
            room -= 1 + len(span)
            if room < 0 or len(kept) == len(self.vocabulary.sentinels):
                break
            kept.append(span)
        return sorted(kept)

    def _corrupted(self, text: Ids, spans: list[list[int]]) -> tuple[Ids, Ids]:
        """What is left of the text, and what was taken out, each with the sentinels."""
        encoder: list[Ids | list[int]] = []
        decoder: list[Ids | list[int]] = [[]]
        begin = 0
        # The spans are never more than the sentinels.
        for span, sentinel in zip(spans, self.vocabulary.sentinels, strict=False):
            encoder += [text[begin : span[0]], [sentinel]]
            decoder += [[sentinel], text[span]]
            begin = span[-1] + 1
        encoder.append(text[begin:])
        return np.concatenate(encoder).astype(np.int64), np.concatenate(decoder).astype(np.int64)


def spans_expected(mask_prob: float, length: int) -> int:
    """Sentinels to have at least for samples of ``length`` tokens: half as many as tokens may be
    masked, which fewer than 2 % of short samples and no long ones exceed."""
    longest = length - T5Dataset.special_tokens
    return -(-int(mask_budget(mask_prob, longest, longest)) // 2)
