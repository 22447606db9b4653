"""What masking must know of a vocabulary: its special ids, and which pieces go on with a word."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mtk.errors import ConfigError, Problem
from mtk.tokenizers import Tokenizer

CONTINUES = "##"  # how WordPiece spells a piece that goes on with a word
_NEEDED = {"bert": ("cls", "sep", "mask"), "t5": ("bos", "eos", "sentinels")}
_SUGGESTED = {
    "bert": "Preprocess with BertWordPieceLowerCase or BertWordPieceCase, or with a "
    "HuggingFaceTokenizer that has [CLS], [SEP] and [MASK].",
    "t5": "Preprocess with --vocab-extra-ids 100 and BertWordPieceLowerCase, BertWordPieceCase "
    "(with --bert-eod eos) or SentencePieceTokenizer, or with a HuggingFaceTokenizer that has "
    "<extra_id_0>, <extra_id_1> and so on.",
}


@dataclass(frozen=True)
class WordVocabulary:
    """size: ids lie in 0..size - 1. ids: int64, those that stand for a piece, rising.
    continues: bool [size], pieces that go on with the word before them (WordPiece's "##"; in
    other vocabularies none does, and every token is a word). sentinels: what stands for a span
    (T5), in the order of their use. pad: fills samples up. Ids the vocabulary lacks are None.
    """

    size: int
    ids: npt.NDArray[np.int64]
    continues: npt.NDArray[np.bool_]
    pad: int = 0
    cls: int | None = None
    sep: int | None = None
    mask: int | None = None
    bos: int | None = None
    eos: int | None = None
    sentinels: tuple[int, ...] = ()


def word_vocabulary(tokenizer: Tokenizer) -> WordVocabulary:
    """The vocabulary of a tokenizer. Without a padding id 0 stands in, which is never seen;
    without BOS the decoder begins with the padding id, as T5 does (Raffel et al. 2020)."""
    pieces = [tokenizer.piece(i) for i in range(tokenizer.vocab_size)]
    return WordVocabulary(
        size=len(pieces),
        ids=np.flatnonzero([bool(piece) for piece in pieces]),
        continues=np.array([piece.startswith(CONTINUES) for piece in pieces], dtype=np.bool_),
        pad=0 if tokenizer.pad is None else tokenizer.pad,
        cls=tokenizer.cls,
        sep=tokenizer.sep,
        mask=tokenizer.mask,
        bos=tokenizer.decoder_start,
        eos=tokenizer.eos,
        sentinels=tokenizer.extra_ids,
    )


def require_special_ids(vocabulary: WordVocabulary, family: str, name: str) -> None:
    """Raise ConfigError unless the vocabulary has what samples of ``family`` are made with.

    name: of the tokenizer, in the message.
    """
    missing = [n for n in _NEEDED[family] if getattr(vocabulary, n) in (None, ())]
    if missing:
        rule = f"needs {', '.join(missing)} in the vocabulary, which {name} has not"
        raise ConfigError([Problem("model.family", family, rule, _SUGGESTED[family])])
