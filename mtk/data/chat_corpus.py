"""Files of conversations -> ids and marks, one conversation after the other, kept in a cache.

Legend of shapes: T ids of all conversations, C conversations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mtk.artifacts.hashing import sha256_json
from mtk.data.chat_template import END, START, ChatTemplate
from mtk.data.conversations import Conversation, Place, read_conversations
from mtk.data.index_cache import IndexCache
from mtk.data.marked_text import GUARD, MarkedText
from mtk.data.provenance import Origin
from mtk.data.records import RecordError
from mtk.data.token_source import Notify, ignore
from mtk.errors import DataError
from mtk.tokenizers import Tokenizer

NAMED = 5  # lines left out that a message names
ARRAYS = 2  # version of what the cache holds


@dataclass(frozen=True)
class ChatCorpus:
    """ids_T, counted_T: of conversations one after the other; starts_C: where each begins, and
    the end; skipped: lines left out; cut: conversations that were too long; lost: of those the
    ones without any token of an answer left, which are not here. places_C4: int64, see
    :class:`~mtk.data.conversations.Place`; files: their names."""

    ids_T: npt.NDArray[np.integer]
    counted_T: npt.NDArray[np.integer]
    starts_C: npt.NDArray[np.integer]
    skipped: int
    cut: int
    lost: int
    places_C4: npt.NDArray[np.integer]
    files: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.starts_C) - 1

    def conversation(self, index: int) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]:
        """Ids of one conversation, and whether each counts (0, 1)."""
        part = slice(int(self.starts_C[index]), int(self.starts_C[index + 1]))
        return self.ids_T[part], self.counted_T[part]

    def origin(self, index: int) -> Origin:
        """Where a conversation was read."""
        place = Place(*self.places_C4[index].tolist())
        end = place.start + place.length
        return Origin(self.files[place.file], "line", place.line, place.start, end)

    def ends(self, count: int) -> set[int]:
        """The last id that counts in each of the first ``count`` conversations."""
        first = map(self.conversation, range(min(count, len(self))))
        return {int(ids[np.flatnonzero(counted)[-1]]) for ids, counted in first}

    @property
    def summary(self) -> str:
        share = float(self.counted_T.mean()) if len(self.counted_T) else 0.0
        text = f"{len(self)} conversations, {len(self.ids_T)} tokens, {share:.0%} of them count"
        for number, what in (
            (self.skipped, "lines left out"),
            (self.cut, "conversations cut to the length of a sample"),
            (self.lost, "left out as no answer was left"),
        ):
            text += f", {number} {what}" if number else ""
        return text


@dataclass(frozen=True)
class ChatReader:
    """How conversations become ids. length: tokens of a sample, one less than ids of the longest
    conversation."""

    template: ChatTemplate
    tokenizer: Tokenizer
    length: int
    skip_bad: bool = False

    @property
    def identity(self) -> str:
        """Digest of all that decides the ids but the files."""
        content = [self.template.source, dict(self.template.tokens), self.tokenizer.fingerprint]
        return sha256_json([*content, self.length, self.skip_bad])

    def corpus(
        self,
        files: Sequence[Path],
        digests: Sequence[str],
        cache: Path | None,
        notify: Notify = ignore,
    ) -> ChatCorpus:
        """The conversations of ``files``, from the cache where they have been read before.

        digests: of the files. cache: its folder (default: beside the first file). Raises
        DataError, also where nothing is left to train on.
        """
        folder = cache or Path(f"{files[0]}.cache")
        description = {"files": list(digests), "reader": self.identity, "arrays": ARRAYS}
        names = [str(path) for path in files]

        def build() -> dict[str, Any]:
            return self._build(files, notify)

        arrays = IndexCache(folder, notify=notify).load_or_build("chat", description, build)
        skipped, cut, lost = (int(count) for count in arrays["counts"])
        texts = arrays["ids"], arrays["counted"], arrays["starts"]
        corpus = ChatCorpus(*texts, skipped, cut, lost, arrays["places"], tuple(names))
        if not len(corpus):
            raise DataError(
                f"{', '.join(names)}: no token is left to train on ({corpus.summary}). Raise "
                f"--seq-length, or check the files."
            )
        return corpus

    def _build(self, files: Sequence[Path], notify: Notify) -> dict[str, Any]:
        marked, bad = MarkedText(self.tokenizer), list[str]()
        ids: list[npt.NDArray[np.int32]] = []
        counted: list[npt.NDArray[np.uint8]] = []
        places: list[Place] = []
        cut = lost = 0

        def encode(conversation: Conversation) -> tuple[list[int], list[bool]]:
            return encode_conversation(conversation, self.template, marked)

        found = read_conversations(files, encode, skip_bad=self.skip_bad, bad=bad)
        for place, (own, marks) in found:
            if len(own) > self.length + 1:
                cut += 1
                own, marks = own[: self.length + 1], marks[: self.length + 1]
            # The first id is never predicted.
            if not any(marks[1:]):
                lost += 1
                continue
            ids.append(np.array(own, dtype=np.int32))
            counted.append(np.array(marks, dtype=np.uint8))
            places.append(place)
        if bad:
            listed = "\n".join(f"  - {line}" for line in bad[:NAMED])
            notify(f"{len(bad)} lines are left out, first:\n{listed}")
        starts = np.concatenate([[0], np.cumsum([len(part) for part in ids], dtype=np.int64)])
        return {
            "ids": np.concatenate([np.empty(0, np.int32), *ids]),
            "counted": np.concatenate([np.empty(0, np.uint8), *counted]),
            "starts": starts.astype(np.int64),
            "places": np.array(places, dtype=np.int64).reshape(-1, len(Place._fields)),
            "counts": np.array([len(bad), cut, lost], dtype=np.int64),
        }


def encode_conversation(
    conversation: Conversation, template: ChatTemplate, marked: MarkedText
) -> tuple[list[int], list[bool]]:
    """Ids of a conversation, and which of them the assistant says. Raises RecordError."""
    private = (START, END, GUARD)
    if any(mark in message.content for message in conversation for mark in private):
        raise RecordError("private character", "U+E000 to U+E002 are kept for templates")
    safe = tuple(replace(m, content=marked.guard(m.content)) for m in conversation)
    return marked.encode(*template.render(safe))
