"""HuggingFaceTokenizer: a folder with ``tokenizer.json``, through the ``tokenizers`` library.

The library ``transformers`` is not needed and no code of the folder is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from tokenizers import Tokenizer as Library

from mtk.errors import DataError
from mtk.tokenizers.base import CARRIED, parse_json, read_file
from mtk.tokenizers.library import ROLES, LibraryTokenizer, transformers_files

# Looked for, in this order, in a folder that names no end-of-sequence token.
USUAL_ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[SEP]")


class HuggingFaceTokenizer(LibraryTokenizer):
    """Any tokenizer that a ``tokenizer.json`` describes.

    Megatron releases differ. Followed here: core 0.15, nothing is added to a text unless
    ``include_special_tokens`` (0.17 and transformers add what the template says). EOD is
    the folder's EOS, else its SEP. Names of special tokens inside a text become those
    tokens, as in transformers, unless the folder's config says ``split_special_tokens``
    (which the tokenizers that mtk trains do).

    options: eod and the other roles (ids or null), include_special_tokens,
    split_special_tokens. files: tokenizer.json.
    """

    kind: ClassVar[str] = "HuggingFaceTokenizer"

    def __init__(
        self,
        options: Mapping[str, Any],
        files: Mapping[str, bytes],
        extra: Mapping[str, bytes] | None = None,
    ) -> None:
        super().__init__(options, files, extra)
        self.library = _parse(files["tokenizer.json"])
        # A stored maximum length would cut documents silently.
        self.library.no_truncation()
        self.library.no_padding()
        self.library.encode_special_tokens = options["split_special_tokens"]
        self.add_special_tokens = options["include_special_tokens"]
        self.eod = options["eod"]
        for role in ROLES:
            setattr(self, role, options[role])
        added = self.library.get_added_tokens_decoder()
        self.specials = frozenset(token for token, entry in added.items() if entry.special)
        self.extra_ids = self._sentinels()

    def _sentinels(self) -> tuple[int, ...]:
        found: list[int] = []
        while (token := self.library.token_to_id(f"<extra_id_{len(found)}>")) is not None:
            found.append(token)
        return tuple(found)

    def transformers_files(self) -> dict[str, bytes]:
        if "tokenizer_config.json" in self.extra:
            return {}
        names = {
            role: self.piece(self.options[role]) for role in ROLES if self.options[role] is not None
        }
        config = transformers_files(self.library, names)["tokenizer_config.json"]
        if not self.options["split_special_tokens"]:
            config = config.replace(
                b'"split_special_tokens": true', b'"split_special_tokens": false'
            )
        return {"tokenizer_config.json": config}


def from_folder(
    folder: Path, *, eod_token: str | None = None, include_special_tokens: bool = False
) -> HuggingFaceTokenizer:
    """A plain Hugging Face folder; special tokens from its configuration files.

    Raises DataError if it has no tokenizer.json, or no end of document can be found.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise DataError(
            f"{folder} has no tokenizer.json. mtk reads tokenizers through the tokenizers "
            f"library only; save it there with save_pretrained of a fast tokenizer."
        )
    files = {"tokenizer.json": read_file(path, "tokenizer")}
    extra = {
        name: read_file(folder / name, "tokenizer") for name in CARRIED if (folder / name).is_file()
    }
    library = _parse(files["tokenizer.json"])
    names, config = _special_names(extra)
    roles: dict[str, int | None] = {}
    for role in ROLES:
        name = names.get(role)
        roles[role] = library.token_to_id(name) if name is not None else None
    options = {
        "eod": _end_of_document(folder, library, eod_token, roles),
        **roles,
        "include_special_tokens": include_special_tokens,
        "split_special_tokens": bool(config.get("split_special_tokens", False)),
    }
    return HuggingFaceTokenizer(options, files, extra)


def _parse(data: bytes) -> Library:
    try:
        return Library.from_buffer(data)
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"tokenizer.json cannot be read: {error}.") from error


def _special_names(extra: Mapping[str, bytes]) -> tuple[dict[str, str], dict[str, Any]]:
    """Role -> token from special_tokens_map.json, overruled by tokenizer_config.json."""
    names: dict[str, str] = {}
    config: dict[str, Any] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if file not in extra:
            continue
        content = parse_json(extra[file], file)
        if not isinstance(content, dict):
            raise DataError(f"{file} must hold an object, not a {type(content).__name__}.")
        config |= content
        for role in ROLES:
            value = content.get(f"{role}_token")
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                names[role] = value
    return names, config


def _end_of_document(
    folder: Path, library: Library, eod_token: str | None, roles: Mapping[str, int | None]
) -> int:
    if eod_token is not None:
        token = library.token_to_id(eod_token)
        if token is None:
            raise DataError(f"{folder}: --eod-token {eod_token!r} is not in the vocabulary.")
        return int(token)
    candidates = [roles["eos"], roles["sep"]]
    candidates += [library.token_to_id(name) for name in USUAL_ENDS]
    found = next((token for token in candidates if token is not None), None)
    if found is None:
        raise DataError(
            f"{folder} names no eos_token and has none of {', '.join(USUAL_ENDS)}. Say which "
            f"token ends documents with --eod-token."
        )
    return int(found)
