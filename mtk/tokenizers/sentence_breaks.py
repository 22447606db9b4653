"""Where sentences end, as NLTK's Punkt decides it, without asking it for every full stop.

NLTK cuts a word, a mark that may end a sentence, and what follows it into tokens and looks at
neighbours (Kiss & Strunk 2006). Here its tokens are remembered by word: most words end a
sentence whatever follows, and for the others (abbreviations, initials, numbers, ellipses) the
remembered tokens of both sides are given to its own rule. Patterns and decisions are the
library's; what is ours is when it need not be asked (again).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

REMEMBERED = 200_000  # words, before all are forgotten
LONGEST = 100  # characters of a word that is remembered
SPACES = " \t\n\r\x0b\x0c"  # NLTK's word before a mark begins behind one of these
# A word of letters, digits and single joints with its full stop, which NLTK keeps as one token
# behind a mark that is always a token by itself. It is neither a number nor an initial. Or the
# full stop alone, behind such a mark.
PLAIN = re.compile(r"(?:^|[()\[\]{}\";:*@])([A-Za-z_](?:[./-]?[0-9A-Za-z_])+)?\.$")

Span = tuple[int, int]
Found = TypeVar("Found")


class Left(NamedTuple):
    """The word with its mark. certain: whether a sentence ends here whatever follows, None if
    that depends on ``token``, the last one, as Punkt's first pass left it."""

    certain: bool | None
    token: Any = None


class Right(NamedTuple):
    """The following word. inside: whether a sentence ends in its middle. token: its first."""

    inside: bool
    token: Any


class SentenceBreaks:
    """Sentences by the parameters of ``punkt``, a ``PunktSentenceTokenizer`` of NLTK."""

    def __init__(self, punkt: Any) -> None:
        self._punkt = punkt
        # NLTK's guard against patterns that never end costs as much as the search; these two
        # take time linear in the text.
        self._candidates = _unguarded(punkt._lang_vars.period_context_re())
        self._closing = _unguarded(punkt._lang_vars.re_boundary_realignment)
        self._collocated = {first for first, _ in punkt._params.collocations}
        self._left: dict[str, Left | None] = {}
        self._right: dict[str, Right | None] = {}
        self._whole: dict[str, bool] = {}
        self._pairs: dict[tuple[str, str], bool] = {}
        self._closes: dict[str, bool] = {}  # characters

    def spans(self, text: str) -> list[Span]:
        """Start and end of every sentence, as ``span_tokenize`` gives them."""
        return list(self._realigned(text, self._slices(text)))

    def _slices(self, text: str) -> list[Span]:
        slices = []
        start = 0
        for match, word in self._words(text):
            if self._ends(match, word):
                slices.append((start, match.end()))
                following = match.start("next_tok")
                start = match.end() if following < 0 else following
        slices.append((start, len(text.rstrip())))
        return slices

    def _words(self, text: str) -> Iterator[tuple[Any, str]]:
        """The last candidate of every word that has any, and the text of that word up to it
        (a line before may stand in front). A mark that begins a word counts by itself too."""
        previous: Any = None
        start = last = 0
        for match in self._candidates.finditer(text):
            place = match.start()
            space = text.rfind(" ", last, place)
            if space < 0:
                space = max(text.rfind(other, last, place) for other in SPACES[1:])
            alone = previous is not None and (last == 0 or (last > 1 and text[last - 1] in SPACES))
            if previous is not None and (space >= 0 or alone):
                yield previous, text[start : last + 1]
            if space >= 0:
                start = space + 1
            previous, last = match, place
        if previous is not None:
            yield previous, text[start : last + 1]

    def _ends(self, match: Any, word: str) -> bool:
        following = match.group("next_tok")
        if "\n" in word:
            word = _last_word(word)
        if following is None:
            whole = word + match.group("after_tok")
            return _remembered(self._whole, whole, self._punkt.text_contains_sentbreak)
        if word[-1] != "." and not following.isspace():
            return True  # "?" and "!" are always tokens, and more tokens follow
        left = _remembered(self._left, word, self._of_left)
        if left is not None and left.certain and not following.isspace():
            return True
        right = _remembered(self._right, following, self._of_right)
        if left is None or right is None:
            context: str = _last_word(word) + match.group("after_tok")
            return bool(self._punkt.text_contains_sentbreak(context))
        if right.inside or left.certain is not None:
            return right.inside
        pair = (word, following)
        known = self._pairs.get(pair)
        if known is None:
            known = self._ends_between(left.token, right.token)
            if len(self._pairs) >= REMEMBERED:
                self._pairs.clear()
            if len(word) + len(following) <= LONGEST:
                self._pairs[pair] = known
        return known

    def _of_left(self, word: str) -> Left | None:
        """None if there is white space inside, by which NLTK's tokens may reach across."""
        word = _last_word(word)
        if self._surely_ends(word):
            return Left(True)
        tokens = self._tokens(word)
        if tokens is None:
            return None
        last = tokens[-1]
        if self._breaks_inside(tokens):
            return Left(True)
        decides = last.period_final and (
            last.abbr
            or last.ellipsis
            or last.is_initial
            or last.is_number
            or last.type_no_period in self._collocated
        )
        return Left(None, last) if decides else Left(bool(last.sentbreak))

    def _surely_ends(self, word: str) -> bool:
        """Whether it ends with a plain word that the parameters do not know as special."""
        plain = PLAIN.search(word)
        if plain is None or any(map(str.isspace, word)):
            return False
        kind = (plain[1] or ".").lower()
        abbreviations = self._punkt._params.abbrev_types
        known = kind in abbreviations or kind.rpartition("-")[2] in abbreviations
        return not known and kind not in self._collocated

    def _of_right(self, word: str) -> Right | None:
        tokens = self._tokens(word)
        return None if tokens is None else Right(self._breaks_inside(tokens), tokens[0])

    def _tokens(self, word: str) -> list[Any] | None:
        """After the first pass; None where a word by itself may have others than in a text."""
        if any(map(str.isspace, word)):
            return None
        punkt = self._punkt
        return list(punkt._annotate_first_pass(punkt._tokenize_words(word))) or None

    def _breaks_inside(self, tokens: list[Any]) -> bool:
        return any(map(self._ends_between, tokens[:-1], tokens[1:]))

    def _ends_between(self, first: Any, second: Any) -> bool:
        """The second pass, which writes into the first token and is made to leave no trace."""
        kept = first.sentbreak, first.abbr
        self._punkt._second_pass_annotation(first, second)
        found = bool(first.sentbreak)
        first.sentbreak, first.abbr = kept
        return found

    def _realigned(self, text: str, slices: list[Span]) -> Iterator[Span]:
        """Quotes and brackets behind the end of a sentence belong to it."""
        moved = 0
        for (start, end), (following, stop) in pairwise(slices):
            start += moved
            closing = None
            if following < stop and self._may_close(text[following]):
                closing = self._closing.match(text, following, stop)
            if closing:
                yield start, following + len(closing.group(0).rstrip())
                moved = closing.end() - following
                continue
            moved = 0
            if start < end:
                yield start, end
        start, end = slices[-1]
        if start + moved < end:
            yield start + moved, end

    def _may_close(self, character: str) -> bool:
        """Whether the pattern can begin with it: by itself it would match to its end."""
        known = self._closes.get(character)
        if known is None:
            known = self._closes[character] = self._closing.match(character) is not None
        return known


def _unguarded(pattern: Any) -> Any:
    """The compiled pattern itself, where NLTK wraps it."""
    return getattr(pattern, "_rx", pattern)


def _last_word(text: str) -> str:
    return text[max(map(text.rfind, SPACES)) + 1 :]


def _remembered(table: dict[str, Found], word: str, find: Callable[[str], Found]) -> Found:
    if word in table:
        return table[word]
    found = find(word)
    if len(word) <= LONGEST:
        if len(table) >= REMEMBERED:
            table.clear()
        table[word] = found
    return found
