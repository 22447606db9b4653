"""JSON by schema: llguidance says which tokens keep an answer inside the schema.

The library is the extra ``guided``; without it, or with a tokenizer whose tokens are no fixed
bytes, ``response_format`` is refused and everything else works.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mtk.errors import ServingError
from mtk.tokenizers import Tokenizer

# Small models that may put white space between tokens of JSON often never stop.
WHITESPACE = r"[ \n\t]{0,16}"
# How SentencePiece spells a space and a byte.
SPACE, UNKNOWN, BYTE = "\u2581", "<unk>", re.compile(r"<0x([0-9A-F]{2})>")
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


class JsonGrammars:
    """Compiles schemas for one tokenizer. size: ids that the model can choose."""

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self._tokenizer, self._size = tokenizer, size
        self._library: Any = None
        self._lock = threading.Lock()

    def compile(self, schema: Mapping[str, Any]) -> JsonGrammar:
        """Raises ServingError (400) if the schema is wrong or guiding is not possible here."""
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise _impossible(
                "this server was installed without the extra 'guided' (pip install 'mtk[guided]')"
            ) from None
        # All references in a schema must lie inside it; the library never fetches any.
        try:
            source = LLMatcher.grammar_from_json_schema(
                json.dumps(schema), overrides={"whitespace_pattern": WHITESPACE}
            )
        except ValueError as error:
            raise _refused(str(error)) from None
        return self.of_source(source)

    def of_source(self, source: str) -> JsonGrammar:
        """From what :attr:`JsonGrammar.source` was in another process; raises as above."""
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokens(), source, log_level=0)
        if matcher.is_error():
            raise _refused(matcher.get_error())
        return JsonGrammar(source, matcher, self._tokenizer.eod)

    def _tokens(self) -> Any:
        """The library's view of the vocabulary; made at first use, which takes a second for
        large ones."""
        from llguidance import LLTokenizer, TokenizerWrapper

        with self._lock:
            if self._library is None:
                vocabulary = _Vocabulary(self._tokenizer, self._size)
                self._library = LLTokenizer(TokenizerWrapper(vocabulary))
            return self._library


class JsonGrammar:
    """Implements :class:`serving.guides.Grammar`."""

    def __init__(self, source: str, matcher: Any, end: int) -> None:
        self.source = source
        self._matcher, self._end = matcher, end

    def begin(self) -> JsonMatcher:
        return JsonMatcher(self._matcher.deep_copy(), self._end)


class JsonMatcher:
    """Implements :class:`serving.guides.Matcher`; a complete answer only allows the end."""

    def __init__(self, matcher: Any, end: int) -> None:
        self._matcher, self._end = matcher, end

    def allowed(self) -> Tensor:
        allowed_V = torch.frombuffer(
            bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8
        )
        allowed_V = allowed_V != 0
        # A schema too involved for the library's limits ends the answer, not the engine.
        if self._matcher.is_error() or not allowed_V.any():
            allowed_V = torch.zeros_like(allowed_V)
            allowed_V[self._end] = True
        return allowed_V

    def accept(self, token: int) -> None:
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)


class _Vocabulary:
    """A tokenizer as llguidance wants it."""

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.eod, tokenizer.bos
        found = token_bytes(tokenizer, size)
        self.special_token_ids = [i for i, data in enumerate(found) if not data]
        self.tokens = [data or f"<|{i}|>".encode() for i, data in enumerate(found)]

        self._ids = {data: i for i, data in enumerate(found) if data}
        self._longest = max(map(len, self._ids), default=1)

    def __call__(self, data: bytes) -> list[int]:
        """Ids that stand for exactly these bytes in the middle of a text."""
        ids = self._tokenizer.encode_alone(data.decode("utf-8", "replace"))
        if all(i < len(self.tokens) for i in ids) and self._join(ids) == data:
            return ids
        return self._greedy(data)  # SentencePiece put a space in front

    def _join(self, ids: list[int]) -> bytes:
        return b"".join(self.tokens[i] for i in ids)

    def _greedy(self, data: bytes) -> list[int]:
        ids: list[int] = []
        at = 0
        while at < len(data):
            ends = range(min(len(data), at + self._longest), at, -1)
            end = next((end for end in ends if data[at:end] in self._ids), None)
            if end is None:
                return ids  # bytes that no token has
            ids.append(self._ids[data[at:end]])
            at = end
        return ids


def token_bytes(tokenizer: Tokenizer, size: int) -> list[bytes]:
    """What each id adds in the middle of a text; b"" for special tokens.

    Raises ServingError (400) for tokenizers of which that cannot be said (WordPiece).
    """
    if tokenizer.exact_bytes:
        return [tokenizer.token_bytes(i) or b"" for i in range(size)]
    pieces = [tokenizer.piece(i) for i in range(size)]
    if not any(piece.startswith(SPACE) for piece in pieces):
        raise _impossible(f"the bytes of a {tokenizer.kind} token depend on its neighbours")
    special = {tokenizer.eod, *getattr(tokenizer, "specials", ())}
    special |= {t for t in (tokenizer.bos, tokenizer.eos, tokenizer.pad) if t is not None}
    return [
        b""
        if i in special or piece == UNKNOWN or tokenizer.token_bytes(i) == b""
        else _spelled(piece)
        for i, piece in enumerate(pieces)
    ]


def _spelled(piece: str) -> bytes:
    byte = BYTE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE, " ").encode()


def _impossible(reason: str) -> ServingError:
    return ServingError(f"response_format is not possible: {reason}", param="response_format")


def _refused(reason: str) -> ServingError:
    return ServingError(f"the JSON schema is refused: {reason}", param="response_format")
