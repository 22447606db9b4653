"""Token ids to text while they arrive: whole characters only, and stop rules on text."""

from __future__ import annotations

from collections.abc import Sequence

from mtk.tokenizers import Tokenizer
from mtk.tokenizers.streaming import StreamingDecoder

# A character of UTF-8 has at most four bytes, so more context never matters.
CONTEXT = 4


class TextStream:
    """Turns one token after the other into text; special tokens show as their names.

    Text that ends in an unfinished character is held back. context: ids that stand before
    the first; they decide about a space in front of it, or begin its first character.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = self._fresh()
        for token in context[-CONTEXT:]:
            self.push(token)

    def push(self, token: int) -> str:
        """The text that became certain with this token; "" while a character is unfinished."""
        whole = not self._tokenizer.exact_bytes
        if whole or self._tokenizer.token_bytes(token) != b"":
            return self._decoder.feed(token)
        return self.flush() + self._tokenizer.decode([token])

    def flush(self) -> str:
        """Whatever is still held back, when nothing follows it."""
        held, self._decoder = self._decoder.finish(), self._fresh()
        return held

    def _fresh(self) -> StreamingDecoder:
        return StreamingDecoder(self._tokenizer, specials=not self._tokenizer.exact_bytes)


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """One slice of text a token; joined they are the whole text.

    A character that is spread over several tokens belongs to the last of them.
    """
    stream = TextStream(tokenizer)
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
