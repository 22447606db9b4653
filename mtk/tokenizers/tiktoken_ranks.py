"""TikTokenizer: byte-level BPE by ranks, run by the ``tiktoken`` library.

Two file formats. Megatron's JSON: a list of ``{"rank", "token_bytes" (base64), "token_str"}``
with rank = position; ids 0 .. N-1 are special tokens and ranks are shifted by N. Plain
``.tiktoken``: a line ``base64 rank``; ids are ranks and special tokens follow.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from mtk.errors import DataError
from mtk.tokenizers.base import Tokenizer, parse_json
from mtk.tokenizers.library import is_unicode

MODEL = "tokenizer.ranks"
NUM_SPECIAL = 1000
VOCAB_SIZE = 131_072
SPECIALS = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
REQUIRED = SPECIALS[:3]

_TAIL = r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PATTERNS: Mapping[str, str] = {
    "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "v2": f"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*{_TAIL}",
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k": f"{_LEAD}{_UPPER}*{_LOWER}+{_CONTRACTION}?|{_LEAD}{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    + _TAIL.replace(r"\p{N}|", r"\p{N}{1,3}|", 1),
    "llama3": _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
_LLAMA3_NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
_LLAMA3_RESERVED = [index for index in range(256) if index not in _LLAMA3_NAMED]
_LLAMA3 = _LLAMA3_NAMED | {
    index: f"<|reserved_special_token_{number}|>" for number, index in enumerate(_LLAMA3_RESERVED)
}
# Published rank files, told apart by their number of ranks: pattern, special tokens, EOD.
KNOWN: Mapping[int, tuple[str, Mapping[str, int], str]] = {
    50_256: ("gpt2", {"<|endoftext|>": 50_256}, "<|endoftext|>"),
    100_256: (
        "cl100k",
        {
            "<|endoftext|>": 100_257,
            "<|fim_prefix|>": 100_258,
            "<|fim_middle|>": 100_259,
            "<|fim_suffix|>": 100_260,
            "<|endofprompt|>": 100_276,
        },
        "<|endoftext|>",
    ),
    128_000: (
        "llama3",
        {name: 128_000 + index for index, name in sorted(_LLAMA3.items())},
        "<|end_of_text|>",
    ),
    199_998: ("o200k", {"<|endoftext|>": 199_999, "<|endofprompt|>": 200_018}, "<|endoftext|>"),
}


class TikTokenizer(Tokenizer):
    """Ranks with special tokens in front of (JSON) or behind (.tiktoken) them.

    Megatron releases differ: as up to core 0.14, names of special tokens inside a text are
    ordinary text; the default special tokens are those of later releases (a superset).

    options: offset (id of rank 0), num_ranks, pattern, special_tokens (name -> id), eod
    (name), vocab_size. files: tokenizer.ranks.
    """

    kind: ClassVar[str] = "TikTokenizer"

    def __init__(self, options: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        import tiktoken

        super().__init__(options, files)
        ranks = parse_ranks(files[MODEL])
        kept = {piece: rank for piece, rank in ranks.items() if rank < options["num_ranks"]}
        self._offset = int(options["offset"])
        self._special: dict[str, int] = dict(options["special_tokens"])
        self._names = {token: name for name, token in self._special.items()}
        self._encoding = tiktoken.Encoding(
            "mtk",
            pat_str=PATTERNS[options["pattern"]],
            mergeable_ranks=kept,
            special_tokens={},
        )
        self._pieces = {rank + self._offset: piece for piece, rank in kept.items()}
        self.eod = self._special[options["eod"]]
        get = self._special.get
        self.bos = get("<s>", get("<|begin_of_text|>"))
        self.eos = self.eod
        self.pad, self.cls = get("<pad>"), get("<cls>")
        self.sep, self.mask = get("<sep>"), get("<mask>")

    @property
    def vocab_size(self) -> int:
        return int(self.options["vocab_size"])

    @property
    def exact_bytes(self) -> bool:
        return True

    def encode(self, text: str) -> list[int]:
        """Raises DataError for text that is not Unicode (lone surrogates)."""
        if not is_unicode(text):
            raise DataError("the text holds a lone surrogate, so it is not Unicode")
        ids = self._encoding.encode_ordinary(text)
        return [token + self._offset for token in ids] if self._offset else ids

    def decode(self, ids: Sequence[int]) -> str:
        parts = (
            self._names[token].encode() if token in self._names else self._pieces.get(token, b"")
            for token in ids
        )
        return b"".join(parts).decode(errors="replace")

    def piece(self, token_id: int) -> str:
        if token_id in self._names:
            return self._names[token_id]
        return self._pieces.get(token_id, b"").decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes | None:
        return b"" if token_id in self._names else self._pieces.get(token_id)


def resolve_options(
    data: bytes,
    *,
    pattern: str = "auto",
    vocab_size: int | None = None,
    num_special: int | None = None,
    special_tokens: Sequence[str] = (),
    eod: str | None = None,
) -> dict[str, Any]:
    """The options of a tokenizer for a file of ranks. Raises DataError where they do not fit."""
    ranks = parse_ranks(data)
    if _is_json(data):
        return _json_options(ranks, pattern, vocab_size, num_special, special_tokens, eod)
    if num_special is not None or vocab_size is not None:
        raise DataError(
            "--tiktoken-num-special-tokens and --vocab-size shape Megatron's JSON vocabularies; "
            "this is a plain .tiktoken file, whose special tokens follow its ranks."
        )
    known = KNOWN.get(len(ranks))
    if known and not special_tokens:
        default_pattern, specials, end = known
    else:
        default_pattern, end = (known[0] if known else "auto"), "<|endoftext|>"
        names = tuple(special_tokens) or (eod or end,)
        first = max(ranks.values()) + 1
        specials = {name: first + index for index, name in enumerate(dict.fromkeys(names))}
    chosen = default_pattern if pattern == "auto" else pattern
    if chosen == "auto":
        raise DataError(
            f"a .tiktoken file of {len(ranks)} ranks is none of the published ones; say how text "
            f"is split with --tiktoken-pattern."
        )
    return _options(0, len(ranks), chosen, dict(specials), eod or end, max(specials.values()) + 1)


def _json_options(
    ranks: Mapping[bytes, int],
    pattern: str,
    vocab_size: int | None,
    num_special: int | None,
    special_tokens: Sequence[str],
    eod: str | None,
) -> dict[str, Any]:
    offset = NUM_SPECIAL if num_special is None else num_special
    names = list(special_tokens or SPECIALS)
    missing = [name for name in REQUIRED if name not in names]
    if missing or len(set(names)) != len(names) or len(names) > offset:
        raise DataError(
            f"special tokens {names} must be distinct, hold {', '.join(REQUIRED)} and be at most "
            f"--tiktoken-num-special-tokens {offset}."
        )
    most = offset + len(ranks)
    size = min(VOCAB_SIZE, most) if vocab_size is None else vocab_size
    if not offset + 256 <= size <= most:
        raise DataError(
            f"--vocab-size {size} must lie between {offset + 256} (specials and bytes) and {most} "
            f"(specials and all {len(ranks)} ranks)."
        )
    names += [f"<SPECIAL_{index}>" for index in range(len(names), offset)]
    specials = {name: index for index, name in enumerate(names)}
    chosen = "v2" if pattern == "auto" else pattern
    return _options(offset, size - offset, chosen, specials, eod or "</s>", size)


def _options(
    offset: int, ranks: int, pattern: str, specials: dict[str, int], eod: str, size: int
) -> dict[str, Any]:
    if eod not in specials:
        raise DataError(f"--eod-token {eod!r} is none of the special tokens.")
    return {
        "offset": offset,
        "num_ranks": ranks,
        "pattern": pattern,
        "special_tokens": specials,
        "eod": eod,
        "vocab_size": size,
    }


def _is_json(data: bytes) -> bool:
    return data.lstrip()[:1] == b"["


def parse_ranks(data: bytes) -> dict[bytes, int]:
    """Token bytes -> rank from either format. Raises DataError with the entry or line."""
    ranks = _parse_json_ranks(data) if _is_json(data) else _parse_plain_ranks(data)
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise DataError(
            f"the vocabulary lacks {len(missing)} of the 256 single bytes (first: "
            f"{missing[0]:#x}), so some text could not be encoded."
        )
    return ranks


def _parse_json_ranks(data: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for position, entry in enumerate(parse_json(data, "the tiktoken vocabulary")):
        try:
            piece, rank = base64.b64decode(entry["token_bytes"], validate=True), entry["rank"]
        except (TypeError, KeyError, binascii.Error) as error:
            raise DataError(f"tiktoken vocabulary, entry {position}: {error!r}.") from error
        if rank != position or piece in ranks:
            raise DataError(
                f"tiktoken vocabulary, entry {position}: rank {rank} or its bytes repeat."
            )
        ranks[piece] = rank
    return ranks


def _parse_plain_ranks(data: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise DataError(f".tiktoken file, line {number}: {error} in {line[:60]!r}.") from error
    if not ranks:
        raise DataError("the .tiktoken file is empty.")
    return ranks
