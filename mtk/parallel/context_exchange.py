"""Context parallelism by all-to-all: from all heads of some tokens to all tokens of some heads.

DeepSpeed-Ulysses (Jacobs et al. 2023). The attention itself is the plain kernel on the whole
sequence, so that whatever it can do (documents, dropout) works here. Fewer key/value heads
than ranks are replicated just as far as each rank needs one.

Shape suffixes: B batch, H query heads, G key/value heads, S local tokens, T all tokens,
D channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mtk.models.attention import CAUSAL, AttentionKernel, Form
from mtk.parallel import collectives
from mtk.parallel.context_balance import by_rank, in_order
from mtk.parallel.context_chunks import per_head
from mtk.parallel.context_gather import all_documents
from mtk.parallel.groups import Group


@dataclass(frozen=True)
class ExchangeKernel:
    """Attention kernel on local tokens; ``inner`` sees all tokens of 1 / cp of the heads.

    Raises ValueError where the heads do not divide; the configuration's rules say so to the
    user before.
    """

    group: Group
    inner: AttentionKernel

    def __call__(
        self,
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
        if mask is not None or bias is not None:
            raise ValueError("context parallelism knows forms and documents, no masks or biases")
        cp, heads, groups = self.group.size, q_BHSD.shape[1], k_BGTD.shape[1]
        if heads % cp:
            raise ValueError(
                f"all-to-all context parallelism shares {heads} heads over {cp} ranks, which does "
                f"not divide; use --cp-comm-type p2p or all_gather, or another --cp"
            )
        repeats = math.lcm(groups, cp) // groups
        shares = [heads // cp, groups * repeats // cp, groups * repeats // cp]
        # One message to each rank: its query, key and value heads.
        parts = [
            torch.unflatten(x, 1, (cp, -1))
            for x in (q_BHSD, per_head(k_BGTD, repeats), per_head(v_BGTD, repeats))
        ]
        mixed = self._to_heads(torch.cat(parts, 2))
        q_BHTD, k, v = torch.split(mixed, shares, 1)
        whole = None if documents is None else all_documents(documents, self.group)
        out_BHTD = self.inner(q_BHTD, k, v, mask=None, dropout=dropout, documents=whole, form=form)
        return self._to_tokens(out_BHTD)

    def _to_heads(self, x: Tensor) -> Tensor:
        """[B, cp, heads, S, D], the second for the rank that gets them -> [B, heads, T, D]."""
        rows = x.movedim(1, 0).contiguous()
        rows = collectives.exchange_rows(rows, None, None, self.group, "cp.exchange")
        return in_order(rows.movedim(0, 2).flatten(2, 3), self.group.size, 2)

    def _to_tokens(self, out_BHTD: Tensor) -> Tensor:
        """[B, own heads, T, D] -> [B, all heads, S, D]."""
        rows = by_rank(out_BHTD, self.group.size, 2)
        rows = torch.unflatten(rows, 2, (self.group.size, -1))
        rows = rows.movedim(2, 0).contiguous()
        rows = collectives.exchange_rows(rows, None, None, self.group, "cp.exchange.out")
        return rows.movedim(0, 1).flatten(1, 2)
