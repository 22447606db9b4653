"""Many requests on one model, or on a copy of it at each of several ranks.

Batches are made from all requests and then dealt to the ranks in turn. So every request is
scored exactly once whatever the number of ranks is, in a batch that does not depend on it
either, and the results come back in the order of the requests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from mtk.errors import WorkerError
from mtk.evaluation.scoring import BATCH_TOKENS, Request, Scored, batches, score
from mtk.models.gpt import GPT
from mtk.parallel.collectives import gather_objects
from mtk.parallel.groups import Group

Advance = Callable[[int], None]


class Scorer:
    """pad: any id of the vocabulary. batch_tokens: padded tokens of a forward pass, at most.
    batch_size: sequences of a forward pass, at most; without ``batch_tokens`` the only limit.
    world: the ranks that share the work; all of them must make the same calls.
    """

    def __init__(
        self,
        model: GPT,
        pad: int,
        *,
        batch_tokens: int | None = None,
        batch_size: int | None = None,
        world: Group | None = None,
    ) -> None:
        self.model, self.pad = model, pad
        self.world = world or Group("world")
        self.limit = batch_size or 2**62
        default = BATCH_TOKENS if batch_size is None else 2**62
        self.batch_tokens = batch_tokens or default

    def score(
        self, requests: Sequence[Request], advance: Advance = lambda count: None
    ) -> list[Scored]:
        """The results in order, on every rank. advance: told the requests that all ranks
        together have about done.

        Raises WorkerError when the ranks do not have the same requests.
        """
        if not requests:
            return []
        rank, size = self.world.rank, self.world.size
        groups = list(batches(requests, self.limit, self.batch_tokens))
        own: dict[int, Scored] = {}
        for number in range(rank, len(groups), size):
            group = groups[number]
            found = score(self.model, [requests[i] for i in group], self.pad)
            own.update(zip(group, found, strict=True))
            advance(sum(len(g) for g in groups[number : number + size]))
        return self._collected(requests, own)

    def share(self, values: dict[int, str], count: int) -> list[str]:
        """Texts by number that each rank has a part of -> all ``count`` of them, in order."""
        found: dict[int, str] = {}
        for part in gather_objects(values, self.world, "evaluate.texts"):
            found |= part
        return [found[number] for number in range(count)]

    def _collected(self, requests: Sequence[Request], own: dict[int, Scored]) -> list[Scored]:
        if self.world.size == 1:
            return [own[index] for index in range(len(requests))]
        parts = gather_objects((digest(requests), own), self.world, "evaluate.scores")
        different = sorted({rank for rank, (d, _) in enumerate(parts) if d != parts[0][0]})
        if different:
            raise WorkerError(
                f"ranks {different} prepared other requests than rank 0: the ranks do not read "
                f"the same data. Evaluate with one process."
            )
        found: dict[int, Scored] = {}
        for _, part in parts:
            found |= part
        return [found[index] for index in range(len(requests))]


def digest(requests: Sequence[Request]) -> bytes:
    """Of everything that decides the results."""
    state = hashlib.blake2b(digest_size=16)
    for request in requests:
        tokens = np.ascontiguousarray(request.tokens, dtype=np.int64)
        state.update(np.array([len(tokens), request.first], dtype=np.int64).tobytes())
        state.update(tokens.tobytes())
    return state.digest()
