"""Byte-level BPE by the optional package ``fastokens``: the ids of ``tokenizers``, sooner.

It re-implements what a ``tokenizer.json`` describes, so it serves only tokenizers whose every
part was compared with the reference, id for id, on each code point of Unicode in several
surroundings and on random mixtures (``tests/tokenizers/test_engines.py`` repeats a part of it).
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtk.errors import DataError
from mtk.tokenizers.base import Tokenizer
from mtk.tokenizers.flat import Flat, Ids, ReferenceEncoder, with_exceptions
from mtk.tokenizers.tiktoken_ranks import MODEL, PATTERNS, parse_ranks

NAME = "fastokens"
# White space to PCRE2, which runs rules with possessive quantifiers, though not to Unicode.
MONGOLIAN_SEPARATOR = "\u180e"
# Splitting rules of a tokenizer.json that gave equal ids; the last is Qwen 2's.
PROVEN_RULES = frozenset(
    [
        PATTERNS["v2"],
        PATTERNS["o200k"],
        PATTERNS["llama3"],
        PATTERNS["llama3"].replace(r"\p{N}{1,3}", r"\p{N}"),
    ]
)


class FastokensEncoder:
    """texts with a character that it treats differently go through ``reference``."""

    name = NAME

    def __init__(self, library: Any, offset: int, reference: ReferenceEncoder, odd: str) -> None:
        self._library, self._offset = library, offset
        self._reference, self._odd = reference, odd

    def encode(self, texts: Sequence[str]) -> Flat:
        odd = [i for i, text in enumerate(texts) if self._odd and self._odd in text]
        if odd:
            usual = FastokensEncoder(self._library, self._offset, self._reference, "")
            return with_exceptions(texts, odd, usual, self._reference)
        try:
            ids, ends = self._library.encode_batch_flat(list(texts), split_special_tokens=True)
        except (UnicodeEncodeError, TypeError) as error:
            raise DataError("the text holds a lone surrogate, so it is not Unicode") from error
        found: Ids = np.frombuffer(ids, np.uint32)
        places = np.frombuffer(ends, np.uint64).astype(np.int64)
        found = found + np.uint32(self._offset) if self._offset else found
        return found, places[1:] - places[:-1]


def fastokens_encoder(tokenizer: Tokenizer) -> FastokensEncoder | None:
    """An encoder with the ids of ``tokenizer``; None if it is not of a kind that was proven, or
    the package is not installed."""
    if not is_installed():
        return None
    import fastokens

    reference = ReferenceEncoder(tokenizer)
    if tokenizer.kind == "TikTokenizer":
        return _of_ranks(tokenizer, reference)
    library = getattr(tokenizer, "library", None)
    if library is None:
        return None
    description = library.to_str()
    if not is_proven(json.loads(description), tokenizer):
        return None
    made = fastokens.Tokenizer.from_json_str(description)
    return FastokensEncoder(made, 0, reference, "")


def is_installed() -> bool:
    """Whether the package is there, found without importing it."""
    from importlib.util import find_spec

    return find_spec("fastokens") is not None


def is_proven(description: dict[str, Any], tokenizer: Tokenizer) -> bool:
    """Whether every part of a tokenizer.json is one that was compared."""
    model = description["model"]
    plain = {
        "dropout": (None,),
        "unk_token": (None,),
        "continuing_subword_prefix": (None, ""),
        "end_of_word_suffix": (None, ""),
        "fuse_unk": (False,),
        "byte_fallback": (False,),
        "ignore_merges": (False, True),
    }
    usual = model["type"] == "BPE" and all(
        model.get(name, legal[0]) in legal for name, legal in plain.items()
    )
    options = tokenizer.options
    # Names of special tokens inside a text are text; every added token is such a name.
    ordinary = options.get("split_special_tokens", True) and all(
        token["special"] for token in description["added_tokens"]
    )
    template = options.get("include_special_tokens", False)
    normalizer = description["normalizer"]
    return (
        usual
        and ordinary
        and not template
        and normalizer in (None, {"type": "NFC"})
        and _splits_as_proven(description["pre_tokenizer"])
    )


def _splits_as_proven(rule: dict[str, Any] | None) -> bool:
    if rule is None:
        return False
    if rule["type"] == "ByteLevel":
        return bool(rule["use_regex"])
    if rule["type"] != "Sequence" or len(rule["pretokenizers"]) != 2:
        return False
    split, spelling = rule["pretokenizers"]
    return (
        split["type"] == "Split"
        and split["pattern"].get("Regex") in PROVEN_RULES
        and split["behavior"] == "Isolated"
        and not split["invert"]
        and spelling["type"] == "ByteLevel"
        and not spelling["add_prefix_space"]
        and not spelling["use_regex"]
    )


def _of_ranks(tokenizer: Tokenizer, reference: ReferenceEncoder) -> FastokensEncoder:
    import fastokens

    most, ranks = tokenizer.options["num_ranks"], parse_ranks(tokenizer.files[MODEL])
    lines = [base64.b64encode(p) + b" %d\n" % rank for p, rank in ranks.items() if rank < most]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "ranks.tiktoken")
        path.write_bytes(b"".join(lines))
        pattern = PATTERNS[tokenizer.options["pattern"]]
        made = fastokens.Tokenizer.from_tiktoken(str(path), pattern=pattern, special_tokens={})
    offset = int(tokenizer.options["offset"])
    return FastokensEncoder(made, offset, reference, MONGOLIAN_SEPARATOR)
