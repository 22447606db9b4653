"""Token ids to text while they arrive: whole characters only, and stop rules on text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character of UTF-8 has at most four bytes, so an unfinished one spans three tokens.
LONGEST_UNFINISHED = 3


class TextCodec(Protocol):
    """What serving needs of a tokenizer; every ``mtk.tokenizers.Tokenizer`` has it."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eod(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class TextStream:
    """Turns one token after the other into text.

    A token may end inside a character of UTF-8, and its text may depend on the token
    before (spaces of word pieces). So each piece is the difference between two decoded
    windows, and text that ends in an unfinished character is held back until it is whole,
    or until it cannot become whole any more. context: ids that stand before the first.
    """

    def __init__(self, codec: TextCodec, context: Sequence[int] = ()) -> None:
        self._codec = codec
        self._window = list(context[-LONGEST_UNFINISHED - 1 :])
        self._known = len(self._window)

    def push(self, token: int) -> str:
        """The text that became certain with this token; "" while a character is unfinished."""
        self._window.append(token)
        text = self._codec.decode(self._window)
        waiting = len(self._window) - self._known
        if text.endswith(REPLACEMENT) and waiting <= LONGEST_UNFINISHED:
            return ""
        return self._take(text)

    def flush(self) -> str:
        """Whatever is still held back, once no token follows."""
        if len(self._window) == self._known:
            return ""
        return self._take(self._codec.decode(self._window))

    def _take(self, text: str) -> str:
        before = self._codec.decode(self._window[: self._known]) if self._known else ""
        if not text.startswith(before):
            # The context ended inside a character that the new tokens completed.
            before = before.rstrip(REPLACEMENT)
        self._window = self._window[self._known :]
        self._known = len(self._window)
        return text[len(before) :]


def pieces(codec: TextCodec, ids: Sequence[int]) -> list[str]:
    """One slice of text a token; joined they are the whole text.

    A character that is spread over several tokens belongs to the last of them.
    """
    stream = TextStream(codec)
    found = [stream.push(token) for token in ids]
    if found:
        found[-1] += stream.flush()
    return found


class StopStrings:
    """Ends text before the first of ``strings``, also when it lies across tokens.

    Text that may be the beginning of a stop string is held back.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that may go out, whether a stop string was found behind it)."""
        if not self._strings:
            return text, False
        text = self._held + text
        starts = [at for at in (text.find(stop) for stop in self._strings) if at >= 0]
        if starts:
            self._held = ""
            return text[: min(starts)], True
        keep = max(_overlap(text, stop) for stop in self._strings)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a true beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class LineStop:
    """Megatron's ``stop_on_eol`` and ``stop_on_double_eol``, by text instead of GPT-2 ids.

    The text stays whole: it ends with the token that brought the newline. before: the
    prompt's text, whose last newline counts as the first of a double one.
    """

    def __init__(self, *, double: bool, before: str) -> None:
        self._wanted = "\n\n" if double else "\n"
        self._tail = before[-1:] if double else ""

    def push(self, text: str) -> bool:
        joined = self._tail + text
        # A tail that is itself the newline must be followed by new text to count.
        found = self._wanted in joined
        self._tail = joined[-1:] if len(self._wanted) > 1 else ""
        return found
