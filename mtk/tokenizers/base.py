"""What every tokenizer offers, its fingerprint, and its folder on disk.

A tokenizer is determined by three things: its kind (Megatron's type name), options that
are plain data, and the contents of its files. They are hashed to the fingerprint that
travels with every dataset and checkpoint; a folder written by :meth:`Tokenizer.save`
holds exactly them, so ``load_tokenizer`` rebuilds the same tokenizer anywhere.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from mtk.errors import DataError

DESCRIPTION = "mtk_tokenizer.json"
FORMAT = 1
# Files of a Hugging Face folder that say what is special in its tokenizer.json.
CARRIED = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


class Tokenizer(ABC):
    """Text to token ids and back.

    options: plain data that decide the ids. files: name -> content, those that decide
    the ids. extra: name -> content of files that only travel along.
    """

    kind: ClassVar[str]
    eod: int
    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    cls: int | None = None
    sep: int | None = None
    mask: int | None = None
    extra_ids: tuple[int, ...] = ()  # sentinels <extra_id_i> of T5

    def __init__(
        self,
        options: Mapping[str, Any],
        files: Mapping[str, bytes],
        extra: Mapping[str, bytes] | None = None,
    ) -> None:
        self.options = dict(options)
        self.files = dict(files)
        self.extra = dict(extra or {})

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, unpadded: all ids lie in 0 .. vocab_size - 1."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; adds no special tokens unless an option says so."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As :meth:`encode` for each text; faster where the library has a batch call."""
        return [self.encode(text) for text in texts]

    def encode_alone(self, text: str) -> list[int]:
        """Ids of ``text`` and nothing else, whatever an option puts around it."""
        return self.encode(text)

    def encode_framed(self, text: str) -> list[int]:
        """Ids of ``text`` with what the tokenizer's template puts around it, as transformers
        gives it to an encoder (T5: EOS behind it); as :meth:`encode` without a template."""
        return self.encode(text)

    @property
    def decoder_start(self) -> int | None:
        """What the decoder of a T5 begins with: BOS, without one the padding id (Raffel et al.
        2020); None without either."""
        return self.pad if self.bos is None else self.bos

    @property
    def bos_first(self) -> bool:
        """Whether texts begin with BOS, by an option here or in transformers, which applies
        the template that comes with a tokenizer."""
        return False

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens included as their names."""

    @abstractmethod
    def piece(self, token_id: int) -> str:
        """The vocabulary's own spelling of a token, e.g. "Ġthe"."""

    def token_bytes(self, token_id: int) -> bytes | None:
        """The exact bytes a token stands for; b"" for specials; None where a token's
        bytes depend on its neighbours (WordPiece, SentencePiece)."""
        del token_id
        return None

    @property
    def exact_bytes(self) -> bool:
        """Whether :meth:`token_bytes` knows every token, so that bytes can be joined."""
        return False

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 over kind, options and the contents of the deciding files."""
        content = {
            "kind": self.kind,
            "options": self.options,
            "files": {name: _sha256(data) for name, data in self.files.items()},
        }
        return _sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode())

    def transformers_files(self) -> dict[str, bytes]:
        """Files that let ``transformers.AutoTokenizer`` load a saved folder, if it can."""
        return {}

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files and ``mtk_tokenizer.json`` into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        contents = {**self.transformers_files(), **self.extra, **self.files}
        for name, data in contents.items():
            (folder / name).write_bytes(data)
        description = {
            "format": FORMAT,
            "kind": self.kind,
            "options": self.options,
            "vocab_size": self.vocab_size,
            "eod": self.eod,
            "fingerprint": self.fingerprint,
            "files": sorted(self.files),
            "extra": sorted(self.extra),
            "sha256": {name: _sha256(data) for name, data in sorted(contents.items())},
        }
        text = json.dumps(description, indent=1, ensure_ascii=False) + "\n"
        (folder / DESCRIPTION).write_text(text, encoding="utf-8")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_file(path: str | Path, role: str) -> bytes:
    """The content of a tokenizer's file. Raises DataError if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path} ({role}) cannot be read: {error.strerror}.") from error


def parse_json(data: bytes, name: str) -> Any:
    """Parse a tokenizer's JSON file. Raises DataError naming the file and the place."""
    try:
        return json.loads(data)
    except ValueError as error:
        raise DataError(f"{name} is not valid JSON: {error}.") from error


def read_description(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """``mtk_tokenizer.json`` and the checked contents of the files it lists.

    Raises DataError if a file is missing or differs from what was saved.
    """
    description = parse_json(
        read_file(folder / DESCRIPTION, "tokenizer"), str(folder / DESCRIPTION)
    )
    try:
        if description["format"] > FORMAT:
            raise DataError(
                f"{folder / DESCRIPTION} has format {description['format']}, this mtk reads up to "
                f"{FORMAT}. Use a newer mtk."
            )
        digests = dict(description["sha256"])
        names = {*description["files"], *description["extra"], *digests}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / DESCRIPTION} is damaged: {error!r}.") from error
    contents = {}
    for name in sorted(names):
        if Path(name).name != name:
            raise DataError(f"{folder / DESCRIPTION} lists {name!r}, which is not in the folder.")
        contents[name] = read_file(folder / name, "tokenizer")
        found, expected = _sha256(contents[name]), digests.get(name)
        if found != expected:
            raise DataError(
                f"{folder / name} changed after it was saved: SHA-256 {found[:16]}..., "
                f"{DESCRIPTION} records {str(expected)[:16]}.... Restore the tokenizer's folder."
            )
    return description, contents
