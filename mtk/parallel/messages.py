"""Point-to-point messages between pipeline stages: fixed shapes known to both sides.

Torch's isend and irecv; the order in which a rank posts them is the caller's, see
``mtk.parallel.schedules`` for why that cannot dead-lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mtk.parallel.groups import Group


class Spec(NamedTuple):
    """Shape and type of a tensor that travels between stages."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Expected:
    """Tensors on their way here."""

    tensors: tuple[Tensor, ...]
    works: tuple[Any, ...]
    group: Group
    site: str

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors, once they are here (on CUDA: once the current stream may use them)."""
        self.group.trace.enter(self.site, self.group.name)
        for work in self.works:
            work.wait()
        self.group.trace.leave()
        return self.tensors


class Mailbox:
    """Sends to and receives from the other ranks of a group."""

    def __init__(self, group: Group, device: torch.device, *, most_outstanding: int) -> None:
        self.group, self.device = group, device
        self._most_outstanding = most_outstanding
        self._sent: deque[tuple[Any, Tensor, str]] = deque()

    def send(self, tensors: Sequence[Tensor], to: int, site: str) -> None:
        """Post the tensors to rank ``to`` of the group; they must not change afterwards."""
        for tensor in tensors:
            tensor = tensor.contiguous()
            work = dist.isend(tensor, self.group.ranks[to], group=self.group.handle)
            self._sent.append((work, tensor, site))
        self._finish(self._most_outstanding)

    def receive(self, specs: Sequence[Spec], sender: int, site: str) -> Expected:
        """Post buffers for the tensors that rank ``sender`` of the group sends next."""
        tensors = tuple(torch.empty(s.shape, dtype=s.dtype, device=self.device) for s in specs)
        works = tuple(
            dist.irecv(tensor, self.group.ranks[sender], group=self.group.handle)
            for tensor in tensors
        )
        return Expected(tensors, works, self.group, site)

    def flush(self) -> None:
        """Wait until everything sent has left."""
        self._finish(0)

    def _finish(self, most: int) -> None:
        while len(self._sent) > most:
            work, _, site = self._sent.popleft()
            self.group.trace.enter(site, self.group.name)
            work.wait()
            self.group.trace.leave()
