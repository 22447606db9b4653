"""Random numbers of dropout: equal where ranks hold the same activations, else different.

Ranks that see other tokens or other layers draw from streams of their own. Tensor-parallel
ranks share a stream where they hold copies of the residual stream; inside attention each has
its own heads, and with sequence parallelism its own rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtk.models.attention import CAUSAL, AttentionKernel, Form
from mtk.parallel.collectives import all_reduce
from mtk.parallel.groups import Group
from mtk.parallel.ranks import Ranks


def stream_seed(seed: int, ranks: Ranks, sequence_parallel: bool, step: int = 0) -> int:
    """Seed of this rank's default generator; ``step`` where a run continues without the
    saved state of the generators. One process keeps ``seed`` itself at step 0."""
    if not ranks.distributed and step == 0:
        return seed
    place = [ranks.pp.rank, ranks.dp.rank, ranks.cp.rank]
    if sequence_parallel:
        place.append(ranks.tp.rank)
    digest = hashlib.sha256(f"{seed}:{place}:{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def own_heads_dropout(kernel: AttentionKernel, group: Group) -> AttentionKernel:
    """``kernel`` with dropout masks that differ between the ranks of ``group``.

    The shared stream gives one number; each rank's own masks start from it, so that
    recomputation repeats them and the shared stream stays the same on all ranks.
    """

    def attend(
        q_BHSD: Tensor,
        k_BGTD: Tensor,
        v_BGTD: Tensor,
        *,
        mask: Tensor | None,
        dropout: float,
        documents: Tensor | None = None,
        form: Form = CAUSAL,
        bias: Tensor | None = None,
    ) -> Tensor:
        run = partial(kernel, mask=mask, documents=documents, form=form, bias=bias)
        if dropout == 0.0:
            return run(q_BHSD, k_BGTD, v_BGTD, dropout=0.0)
        with _own_stream(group, q_BHSD.device):
            return run(q_BHSD, k_BGTD, v_BGTD, dropout=dropout)

    # Generators are swapped on the host, which cannot be traced.
    disabled: AttentionKernel = torch.compiler.disable(attend)  # type: ignore[no-untyped-call]
    return disabled


class OwnPartDropout(nn.Module):
    """Dropout on channels of which each rank of ``group`` has its own part."""

    def __init__(self, p: float, group: Group) -> None:
        super().__init__()
        self.p, self.group = p, group

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        with _own_stream(self.group, x.device):
            return F.dropout(x, self.p)


class SharedDropout(nn.Module):
    """Dropout on what the ranks of ``group`` compute alike, though each has a stream of its
    own."""

    def __init__(self, p: float, group: Group) -> None:
        super().__init__()
        self.p, self.group = p, group

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        start = torch.randint(2**31, (1,)).to(x.device)
        with _stream(int(all_reduce(start, self.group, "tp.dropout", "max").item()), x.device):
            return F.dropout(x, self.p)


def _own_stream(group: Group, device: torch.device) -> AbstractContextManager[None]:
    """Random numbers that differ between the ranks of ``group``, from one of the shared stream."""
    return _stream(int(torch.randint(2**31, (1,)).item()) + group.rank, device)


@contextmanager
def _stream(start: int, device: torch.device) -> Iterator[None]:
    """Random numbers from ``start`` on, beside the stream of this rank."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(start)
        yield
