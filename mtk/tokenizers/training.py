"""Train byte-level BPE, WordPiece or byte-level unigram vocabularies from a corpus.

The same texts give the same bytes. The library's BPE trainer does so by itself; its
WordPiece trainer numbers continuing characters in the order of a random hash map, so they
are numbered here first; its Unigram trainer cannot be made to, see ``unigram.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from mtk.config.tokenizer import TrainTokenizerConfig
from mtk.tokenizers.base import Tokenizer
from mtk.tokenizers.huggingface import HuggingFaceTokenizer
from mtk.tokenizers.library import (
    ROLES,
    BertWordPieceCase,
    BertWordPieceLowerCase,
    transformers_files,
)
from mtk.tokenizers.unigram import train_unigram

WORDPIECE_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[BOS]", "[EOS]")
UNKNOWN = "<unk>"
LARGEST_ALPHABET = 1000  # rarer characters (of WordPiece) are unknown


def train_tokenizer(config: TrainTokenizerConfig, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """The tokenizer of ``config.type`` that fits the corpus; ``texts()`` walks through it.

    bpe and unigram become a HuggingFaceTokenizer over bytes, for which no text is unknown;
    wordpiece becomes BertWordPieceLowerCase or BertWordPieceCase.
    """
    if config.type == "wordpiece":
        return _wordpiece(config, texts)
    library = (_bpe if config.type == "bpe" else _unigram)(config, texts())
    return _byte_level(library, config.eod_token)


def _bpe(config: TrainTokenizerConfig, texts: Iterable[str]) -> Library:
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=[config.eod_token],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    return library


def _unigram(config: TrainTokenizerConfig, texts: Iterable[str]) -> Library:
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in splitter.pre_tokenize_str(text))
    specials = [config.eod_token, UNKNOWN]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    scores = train_unigram(counts, alphabet, config.vocab_size - len(specials))
    ranked = sorted(scores.items(), key=lambda item: (-item[1], item[0]))
    pieces = [(name, 0.0) for name in specials] + ranked
    library = Library(models.Unigram(pieces, unk_id=specials.index(UNKNOWN)))
    library.pre_tokenizer = splitter
    library.decoder = decoders.ByteLevel()
    return library


def _byte_level(library: Library, eod_token: str) -> HuggingFaceTokenizer:
    eod = library.token_to_id(eod_token)
    options = dict.fromkeys(ROLES) | {
        "eod": eod,
        "bos": eod,
        "eos": eod,
        "include_special_tokens": False,
        "split_special_tokens": True,
    }
    library.add_special_tokens([AddedToken(eod_token, special=True, normalized=False)])
    contents = transformers_files(library, {"bos": eod_token, "eos": eod_token})
    config = contents.pop("tokenizer_config.json")
    return HuggingFaceTokenizer(options, contents, {"tokenizer_config.json": config})


def _wordpiece(config: TrainTokenizerConfig, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    library = Library(models.WordPiece(unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer(lowercase=config.lowercase)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    room = (config.vocab_size - len(WORDPIECE_SPECIALS)) // 2
    alphabet = _frequent_characters(library, texts(), min(LARGEST_ALPHABET, room))
    trainer = trainers.WordPieceTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=[*WORDPIECE_SPECIALS, *alphabet, *(f"##{c}" for c in alphabet)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    library.train_from_iterator(texts(), trainer)
    by_id = sorted(library.get_vocab().items(), key=lambda item: item[1])
    vocabulary = "".join(f"{piece}\n" for piece, _ in by_id).encode()
    kind = BertWordPieceLowerCase if config.lowercase else BertWordPieceCase
    return kind({"bert_eod": "eos", "extra_ids": 0}, {"vocab.txt": vocabulary})


def _frequent_characters(library: Library, texts: Iterable[str], most: int) -> list[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(library.normalizer.normalize_str(text))
    ranked = sorted(
        (character for character in counts if not character.isspace()),
        key=lambda character: (-counts[character], character),
    )
    return sorted(ranked[:most])
