"""Tokenizers on a SentencePiece model file (Kudo & Richardson 2018), an optional package."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from mtk.errors import ConfigError, DataError
from mtk.tokenizers.base import Tokenizer

MODEL = "tokenizer.model"


def load_processor(data: bytes) -> Any:
    """The library's processor. Raises ConfigError without the package, DataError for a bad file."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ConfigError(
            "SentencePiece models need the package sentencepiece: pip install 'mtk[hf]'."
        ) from error
    try:
        return SentencePieceProcessor(model_proto=data)
    except (RuntimeError, ValueError) as error:
        raise DataError(f"{MODEL} is not a SentencePiece model: {error}.") from error


class GPTSentencePieceTokenizer(Tokenizer):
    """The plain model: EOD is its EOS, no tokens are added to the vocabulary or to a text.

    options: add_bos (put BOS in front of every text). files: tokenizer.model.
    """

    kind: ClassVar[str] = "GPTSentencePieceTokenizer"

    def __init__(self, options: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        super().__init__(options, files)
        self.processor = load_processor(files[MODEL])
        self.add_bos = bool(options["add_bos"])
        self._size = int(self.processor.get_piece_size())
        self.bos, self.eos, self.pad = (
            None if token < 0 else int(token)
            for token in (
                self.processor.bos_id(),
                self.processor.eos_id(),
                self.processor.pad_id(),
            )
        )
        if self.add_bos and self.bos is None:
            raise DataError(f"{MODEL} has no BOS piece, so --tokenizer-add-bos cannot be honoured.")
        self._set_roles()

    def _set_roles(self) -> None:
        if self.eos is None:
            raise DataError(
                f"{MODEL} has no EOS piece to end documents with. Use SentencePieceTokenizer with "
                f"--tokenizer-sentencepiece-legacy, which appends <EOD>."
            )
        self.eod = self.eos

    @property
    def vocab_size(self) -> int:
        return self._size

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_alone(self, text: str) -> list[int]:
        ids = self.encode(text)
        return ids[1:] if self.add_bos else ids

    @property
    def bos_first(self) -> bool:
        return self.add_bos

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Raises DataError for text that is not Unicode (lone surrogates)."""
        try:
            found = self.processor.encode(list(texts), add_bos=self.add_bos, num_threads=1)
        except UnicodeEncodeError as error:
            raise DataError("the text holds a lone surrogate, so it is not Unicode") from error
        return [list(ids) for ids in found]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.processor.decode(list(ids)))

    def piece(self, token_id: int) -> str:
        return str(self.processor.id_to_piece(token_id)) if 0 <= token_id < self._size else ""

    def token_bytes(self, token_id: int) -> bytes | None:
        """Exact for byte pieces; other pieces depend on the model's treatment of spaces."""
        if token_id >= self._size or self.processor.is_control(token_id):
            return b""
        if self.processor.is_byte(token_id):
            return bytes([int(self.piece(token_id)[1:-1], 16)])
        return None


class Llama2Tokenizer(GPTSentencePieceTokenizer):
    """Llama's model. Followed here: core 0.15, no BOS in front of a text; up to 0.14 every
    text began with BOS, which ``--tokenizer-add-bos`` gives."""

    kind: ClassVar[str] = "Llama2Tokenizer"


class SentencePieceTokenizer(GPTSentencePieceTokenizer):
    """SentencePiece with or without Megatron's additions.

    Default as core 0.15: the plain model, plus ``<extra_id_i>`` if asked for. legacy (up to
    0.14): appends, where absent, ``<CLS> <SEP> <EOD> <MASK>``, pad, BOS, EOS and the extra
    ids; EOD is ``<EOD>``; special tokens found literally in a text become their id.

    options: add_bos, legacy, extra_ids (count), special_tokens (further names).
    """

    kind: ClassVar[str] = "SentencePieceTokenizer"

    def _set_roles(self) -> None:
        names: list[str] = []
        if self.options["legacy"]:
            names += ["<CLS>", "<SEP>", "<EOD>", "<MASK>"]
            names += [self._own_or(self.pad, "<PAD>"), self._own_or(self.bos, "<BOS>")]
            names += [self._own_or(self.eos, "<EOS>")]
        names += self.options["special_tokens"]
        sentinels = [f"<extra_id_{index}>" for index in range(self.options["extra_ids"])]
        self._special: dict[str, int] = {}
        for name in [*names, *sentinels]:
            own = self.processor.piece_to_id(name)
            if self.processor.id_to_piece(own) == name:
                self._special[name] = int(own)
            elif name not in self._special:
                self._special[name] = self._size
                self._size += 1
        self._appended = {token: name for name, token in self._special.items()}
        self.extra_ids = tuple(self._special[name] for name in sentinels)
        longest_first = sorted(self._special, key=len, reverse=True)
        self._finder = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        if not self.options["legacy"]:
            super()._set_roles()
            return
        self.cls, self.sep = self._special["<CLS>"], self._special["<SEP>"]
        self.eod, self.mask = self._special["<EOD>"], self._special["<MASK>"]
        self.pad, self.bos, self.eos = (self._special[name] for name in names[4:7])

    def _own_or(self, token: int | None, name: str) -> str:
        return name if token is None else str(self.processor.id_to_piece(token))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if not self.options["legacy"]:
            return super().encode_batch(texts)
        return [self._encode_with_specials(text) for text in texts]

    def _encode_with_specials(self, text: str) -> list[int]:
        ids: list[int] = [self.bos] if self.add_bos and self.bos is not None else []
        for part in self._finder.split(text):
            if part in self._special:
                ids.append(self._special[part])
            elif part:
                try:
                    ids += self.processor.encode(part)
                except UnicodeEncodeError as error:
                    message = "the text holds a lone surrogate, so it is not Unicode"
                    raise DataError(message) from error
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens stand between spaces."""
        words: list[str] = []
        plain: list[int] = []
        for token in ids:
            if token in self._appended:
                words += [self.processor.decode(plain)] if plain else []
                words.append(self._appended[token])
                plain = []
            else:
                plain.append(int(token))
        words += [self.processor.decode(plain)] if plain else []
        return " ".join(words)

    def piece(self, token_id: int) -> str:
        return self._appended.get(token_id) or super().piece(token_id)

    def token_bytes(self, token_id: int) -> bytes | None:
        return b"" if token_id in self._appended else super().token_bytes(token_id)
