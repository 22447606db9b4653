"""Tokenizers that run on Hugging Face's ``tokenizers`` library: GPT-2 BPE and BERT WordPiece.

No template is applied: nothing is added in front of or behind a text. The names of special
tokens inside a text are ordinary text here, so a document cannot forge its own end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from mtk.errors import DataError
from mtk.tokenizers.base import Tokenizer, parse_json
from mtk.tokenizers.byte_level import piece_bytes

END_OF_TEXT = "<|endoftext|>"
ROLES = ("bos", "eos", "pad", "cls", "sep", "mask")


class LibraryTokenizer(Tokenizer):
    """Common part: ``self.library`` does the work.

    specials: ids that stand for no text of their own. add_special_tokens: apply the
    library's template.
    """

    library: Library
    specials: frozenset[int] = frozenset()
    add_special_tokens = False

    @cached_property
    def vocab_size(self) -> int:
        # Files with holes in their numbering need the larger of the two.
        vocabulary = self.library.get_vocab(with_added_tokens=True)
        return max(len(vocabulary), max(vocabulary.values()) + 1)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Raises DataError for text that is not Unicode (lone surrogates)."""
        return self._encoded(texts, self.add_special_tokens)

    def encode_alone(self, text: str) -> list[int]:
        return self._encoded([text], False)[0]

    def encode_framed(self, text: str) -> list[int]:
        return self._encoded([text], True)[0]

    @property
    def bos_first(self) -> bool:
        around = self._encoded([""], True)[0]
        return self.bos is not None and around[:1] == [self.bos]

    def _encoded(self, texts: Sequence[str], template: bool) -> list[list[int]]:
        try:
            encodings = self.library.encode_batch_fast(list(texts), add_special_tokens=template)
        except (UnicodeEncodeError, TypeError) as error:
            bad = next((text for text in texts if not is_unicode(text)), None)
            if bad is None:
                raise
            raise DataError("the text holds a lone surrogate, so it is not Unicode") from error
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.library.decode(list(ids), skip_special_tokens=False))

    def piece(self, token_id: int) -> str:
        return self.library.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes | None:
        if token_id in self.specials:
            return b""
        if not self.exact_bytes:
            return None
        # Asked for every token that is served, twice.
        if token_id not in self._known_bytes:
            added = self._added.get(token_id)
            spelled = piece_bytes(self.piece(token_id)) if added is None else added.encode()
            self._known_bytes[token_id] = spelled
        return self._known_bytes[token_id]

    @cached_property
    def _known_bytes(self) -> dict[int, bytes | None]:
        return {}

    @cached_property
    def _added(self) -> dict[int, str]:
        added = self.library.get_added_tokens_decoder()
        return {token_id: str(token.content) for token_id, token in added.items()}

    @cached_property
    def exact_bytes(self) -> bool:
        """True for byte-level vocabularies: every piece spells bytes."""
        return isinstance(self.library.decoder, decoders.ByteLevel)


def is_unicode(text: str) -> bool:
    """False for text with lone surrogates, which UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class GPT2BPETokenizer(LibraryTokenizer):
    """Byte-level BPE from GPT-2's ``vocab.json`` and ``merges.txt``.

    Follows Megatron up to core 0.14: ``<|endoftext|>`` is the EOD and is *not* recognised
    inside a text (later releases, on transformers, do recognise it).

    files: vocab.json (piece -> id), merges.txt (a pair a line, after an optional header).
    """

    kind: ClassVar[str] = "GPT2BPETokenizer"

    def __init__(self, files: Mapping[str, bytes]) -> None:
        super().__init__({"eod": END_OF_TEXT}, files)
        vocabulary = vocabulary_from_json(files["vocab.json"], "vocab.json")
        merges = parse_merges(files["merges.txt"], vocabulary)
        if END_OF_TEXT not in vocabulary:
            raise DataError(f"the vocabulary has no {END_OF_TEXT}, which ends GPT-2's documents.")
        self.library = byte_level_bpe(vocabulary, merges)
        self.eod = self.eos = self.bos = vocabulary[END_OF_TEXT]
        self.specials = frozenset({self.eod})

    def transformers_files(self) -> dict[str, bytes]:
        return transformers_files(self.library, {"bos": END_OF_TEXT, "eos": END_OF_TEXT})


class BertWordPieceTokenizer(LibraryTokenizer):
    """BERT's WordPiece from ``vocab.txt`` (a piece a line).

    Megatron releases differ. bert_eod "eos" (default) follows core up to 0.14: ``[BOS]`` and
    ``[EOS]`` are appended if the vocabulary lacks them (30522 -> 30524), then
    ``<extra_id_0>...``; EOD is ``[EOS]``; words of up to 200 characters are cut. "sep"
    follows 0.15: nothing but the extra ids is appended, EOD is ``[SEP]``, 100 characters.
    In both, nothing is added to a text (0.17 wraps it in ``[CLS]``/``[SEP]``).
    """

    lowercase: ClassVar[bool]

    def __init__(self, options: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        super().__init__(options, files)
        variant: Literal["eos", "sep"] = options["bert_eod"]
        vocabulary = parse_vocabulary_lines(files["vocab.txt"])
        names = {"pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
        missing = [name for name in (*names.values(), "[UNK]") if name not in vocabulary]
        if missing:
            raise DataError(f"vocab.txt has no {', '.join(missing)}; is it a BERT vocabulary?")
        if variant == "eos":
            names |= {"bos": "[BOS]", "eos": "[EOS]"}
        sentinels = [f"<extra_id_{index}>" for index in range(options["extra_ids"])]
        for name in [*names.values(), *sentinels]:
            vocabulary.setdefault(name, len(vocabulary))
        for role, name in names.items():
            setattr(self, role, vocabulary[name])
        self.eod = vocabulary[names[variant]]
        self.extra_ids = tuple(vocabulary[name] for name in sentinels)
        self._names = names
        self._sentinels = sentinels
        self.specials = frozenset(vocabulary[name] for name in names.values())
        self.library = self._build(vocabulary, 200 if variant == "eos" else 100)

    def _build(self, vocabulary: dict[str, int], longest_word: int) -> Library:
        model = models.WordPiece(
            vocab=vocabulary, unk_token="[UNK]", max_input_chars_per_word=longest_word
        )
        library = Library(model)
        library.normalizer = normalizers.BertNormalizer(lowercase=self.lowercase)
        library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        library.decoder = decoders.WordPiece(prefix="##", cleanup=False)
        return library

    def transformers_files(self) -> dict[str, bytes]:
        return transformers_files(self.library, {**self._names, "unk": "[UNK]"}, self._sentinels)


class BertWordPieceLowerCase(BertWordPieceTokenizer):
    """WordPiece of uncased BERT: case and accents are folded."""

    kind: ClassVar[str] = "BertWordPieceLowerCase"
    lowercase: ClassVar[bool] = True


class BertWordPieceCase(BertWordPieceTokenizer):
    """WordPiece of cased BERT (Megatron 0.15 adds 100 extra ids here; give them explicitly)."""

    kind: ClassVar[str] = "BertWordPieceCase"
    lowercase: ClassVar[bool] = False


def byte_level_bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Library:
    """GPT-2's splitting rule and byte spelling around a BPE model."""
    library = Library(models.BPE(vocab=vocabulary, merges=merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    library.decoder = decoders.ByteLevel()
    return library


def vocabulary_from_json(data: bytes, name: str) -> dict[str, int]:
    """A ``{piece: id}`` file. Raises DataError if it is anything else."""
    vocabulary = parse_json(data, name)
    if not isinstance(vocabulary, dict) or not all(isinstance(i, int) for i in vocabulary.values()):
        raise DataError(f"{name} must map pieces to ids, as GPT-2's vocab.json does.")
    return vocabulary


def parse_merges(data: bytes, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs of merges.txt in order. Raises DataError with the line of a malformed one."""
    merges = []
    for number, line in enumerate(_decoded(data, "merges.txt").split("\n"), start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.rstrip("\r").partition(" ")
        if not left or not right or " " in right:
            raise DataError(f"merges.txt, line {number}: {line!r} is not a pair of pieces.")
        unknown = [piece for piece in (left, right, left + right) if piece not in vocabulary]
        if unknown:
            raise DataError(
                f"merges.txt, line {number}: {unknown[0]!r} is not in vocab.json; the two files "
                f"belong to different tokenizers."
            )
        merges.append((left, right))
    return merges


def parse_vocabulary_lines(data: bytes) -> dict[str, int]:
    """Pieces of vocab.txt by line. Raises DataError for a piece that occurs twice."""
    lines = _decoded(data, "vocab.txt").split("\n")
    if lines and not lines[-1]:
        lines.pop()
    vocabulary: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        piece = line.strip()
        if piece in vocabulary:
            first = vocabulary[piece] + 1
            raise DataError(f"vocab.txt, line {number}: {piece!r} stands in line {first} already.")
        vocabulary[piece] = number - 1
    return vocabulary


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 at byte {error.start}.") from error


def transformers_files(
    library: Library, names: Mapping[str, str], sentinels: Sequence[str] = ()
) -> dict[str, bytes]:
    """``tokenizer.json`` and ``tokenizer_config.json`` with the same ids in transformers.

    names: role ("bos", "eos", "unk", ...) -> token. Special tokens are declared, but
    ``split_special_tokens`` keeps their names inside texts ordinary, as here.
    """
    copy = Library.from_str(library.to_str())
    copy.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in dict.fromkeys(names.values())]
    )
    if sentinels:
        copy.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in sentinels])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{role}_token": name for role, name in names.items()},
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    if sentinels:
        config["extra_special_tokens"] = list(sentinels)
    return {
        "tokenizer.json": copy.to_str(pretty=False).encode(),
        "tokenizer_config.json": (json.dumps(config, indent=1) + "\n").encode(),
    }
