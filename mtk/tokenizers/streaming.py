"""Text of token ids that arrive one by one, without ever showing half a character."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator

from mtk.tokenizers.base import Tokenizer

_REPLACEMENT = "\ufffd"
_LONGEST_PENDING = 16


class StreamingDecoder:
    """Feed ids, get the text that is complete.

    With a tokenizer whose tokens are exact bytes, an incremental UTF-8 decoder holds back
    unfinished characters (invalid bytes become U+FFFD, as in decoding at once). For other
    tokenizers the growing end is decoded again and only what no longer changes is emitted.
    Special tokens are left out; with ``specials`` (only where tokens are no exact bytes) they
    show as their names, with the space around them that the tokenizer puts there.

    The pieces plus :meth:`finish` add up to the decoding of all other ids at once.
    """

    def __init__(self, tokenizer: Tokenizer, *, specials: bool = False) -> None:
        self._tokenizer = tokenizer
        self._specials = specials
        self._exact = tokenizer.exact_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._ids: list[int] = []
        self._start = 0  # ids from here on are decoded again
        self._read = 0  # ids before this one are emitted

    def feed(self, token_id: int) -> str:
        """The text that ``token_id`` completes; often a word, sometimes ""."""
        data = self._tokenizer.token_bytes(token_id)
        if self._exact:
            return self._utf8.decode(data or b"")
        if data == b"" and not self._specials:
            return ""
        self._ids.append(token_id)
        return self._emit(final=False)

    def finish(self) -> str:
        """What is left over, e.g. a character whose last bytes never came."""
        return self._utf8.decode(b"", final=True) if self._exact else self._emit(final=True)

    def _emit(self, *, final: bool) -> str:
        # Two windows with the same start, so that what a tokenizer does at the beginning
        # of a text (dropping a space) cancels out.
        before = self._tokenizer.decode(self._ids[self._start : self._read])
        now = self._tokenizer.decode(self._ids[self._start :])
        pending = len(self._ids) - self._read
        if now.endswith(_REPLACEMENT) and not final and pending < _LONGEST_PENDING:
            return ""
        self._start, self._read = self._read, len(self._ids)
        return now[len(before) :]


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Non-empty pieces of text as ``ids`` arrive."""
    decoder = StreamingDecoder(tokenizer)
    for token_id in ids:
        if text := decoder.feed(token_id):
            yield text
    if text := decoder.finish():
        yield text
