"""Token ids of a text of which some parts count: no token lies across a border.

A model is asked with the tokens of a prompt and answers with tokens of its own, so the text is
cut at the borders exactly there. Where the ids of a longer text go on from those of a shorter
one, they are those of the whole text; else the part is encoded on its own, as in generation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mtk.data.chat_template import Span
from mtk.tokenizers import Tokenizer

# Stands inside the names of special tokens in messages, so that they stay ordinary text.
GUARD = "\ue002"


class MarkedText:
    """Encodes text of templates.

    Special tokens that the template writes become their ids, whether or not the tokenizer looks
    for them in texts; names of those it does not look for are ordinary text in messages.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        ids = {tokenizer.eod, *getattr(tokenizer, "specials", ())}
        ids |= {t for t in (tokenizer.bos, tokenizer.eos, tokenizer.pad) if t is not None}
        names = {tokenizer.piece(token): token for token in sorted(ids)}
        # The others are found by the tokenizer itself, with its own rules about spaces.
        self._unseen = {n: t for n, t in names.items() if n and tokenizer.encode_alone(n) != [t]}
        listed = sorted(map(re.escape, self._unseen), key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(listed)})") if listed else None

    def guard(self, content: str) -> str:
        """``content`` of a message in which names of special tokens are ordinary text."""
        if self._pattern is None:
            return content
        return self._pattern.sub(lambda name: f"{name[0][0]}{GUARD}{name[0][1:]}", content)

    def ids(self, text: str) -> list[int]:
        """Ids of a whole text, or of a part of one."""
        if self._pattern is None:
            return self._tokenizer.encode_alone(text)
        found: list[int] = []
        for part in self._pattern.split(text):
            if part in self._unseen:
                found.append(self._unseen[part])
            elif part:
                found += self._tokenizer.encode_alone(part.replace(GUARD, ""))
        return found

    def encode(self, text: str, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
        """Ids, and which of them lie in ``spans`` (in order, apart)."""
        ids: list[int] = []
        counted: list[bool] = []
        done = 0
        borders = [
            (at, inside) for span in spans for at, inside in zip(span, (False, True), strict=True)
        ]
        for border, inside in [*borders, (len(text), False)]:
            whole = self.ids(text[:border])
            goes_on = whole[: len(ids)] == ids
            new = whole[len(ids) :] if goes_on else self.ids(text[done:border])
            ids += new
            counted += [inside] * len(new)
            done = border
        return ids, counted
