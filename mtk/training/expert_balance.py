"""How evenly a job's experts were used in a step, and what follows for their biases.

Shape suffixes: L MoE layers of the model, X experts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mtk.models.balance import NAMES, max_violation, move_biases
from mtk.models.moe import MoE
from mtk.parallel.apply import Placed
from mtk.parallel.ranks import Ranks


class ExpertBalance:
    """All MoE layers of a job as one rank knows them.

    Each step: :meth:`begin`, then :meth:`part` of every rank summed up, which :meth:`figures`
    reads; :meth:`move_biases` only if the step is applied.
    """

    def __init__(self, placed: Placed, ranks: Ranks) -> None:
        self.ranks = ranks
        self._records = [part.balance for part in placed.parts if part.balance is not None]
        self._layers = [m for part in placed.parts for m in part.modules() if isinstance(m, MoE)]
        config = placed.parts[0].config
        self._shape = (config.moe_layers, config.num_experts or 0)
        self.rate = config.moe_router_bias_update_rate
        self.names = balance_names(bool(self._records), config.moe_router_enable_expert_bias)
        self._chosen_LX = torch.zeros(self._shape, dtype=torch.float64)

    def begin(self, *, samples: int, tokens: int, loss_scale: float) -> None:
        """Of the whole global batch; see ``BalanceLosses.begin``."""
        for record in self._records:
            record.begin(self.ranks.device, samples=samples, tokens=tokens, loss_scale=loss_scale)

    def part(self) -> Tensor:
        """fp64: losses, counts [L, X], and the range of each layer's biases, as far as this rank
        is the one to tell; empty for a dense model."""
        device = self.ranks.device
        if not self._records:
            return torch.zeros(0, dtype=torch.float64, device=device)
        losses = torch.zeros(len(NAMES), device=device)
        chosen_LX = torch.zeros(self._shape, dtype=torch.float64, device=device)
        for record in self._records:
            losses = losses + record.means()
            # Tensor-parallel ranks all count the same tokens.
            if self.ranks.tp.first:
                chosen_LX += record.chosen(device)
        parts = [losses.double(), chosen_LX.flatten()]
        if len(self.names) > len(NAMES) + 1:
            parts.append(self._ranges())
        return torch.cat(parts)

    def figures(self, whole: Tensor) -> Tensor:
        """fp32, one for each of ``names``, from the sum of all ranks' parts."""
        if not self._records:
            return whole.float()
        layers, experts = self._shape
        counted = len(NAMES) + layers * experts
        losses, chosen = whole[: len(NAMES)], whole[len(NAMES) : counted]
        ranges = whole[counted:]
        self._chosen_LX = chosen.view(layers, experts)
        found = [*losses, max_violation(self._chosen_LX)]
        if len(ranges):
            found.append(ranges.mean())
        return torch.stack(found).float()

    def move_biases(self) -> None:
        """By the counts that the last :meth:`figures` saw; those of a frozen router stay."""
        trained = ((n, m) for n, m in self._numbered() if m.router.weight.requires_grad)
        biases = {n: m.router.expert_bias for n, m in trained}
        own = {number: bias for number, bias in biases.items() if bias is not None}
        move_biases(own, self._chosen_LX, self.rate)

    def _ranges(self) -> Tensor:
        ranges = torch.zeros(self._shape[0], dtype=torch.float64, device=self.ranks.device)
        for number, layer in self._numbered():
            bias = layer.router.expert_bias
            if bias is not None and self.ranks.tp.first and self.ranks.shards.first:
                ranges[number] = (bias.max() - bias.min()).double()
        return ranges

    def _numbered(self) -> Iterator[tuple[int, MoE]]:
        """The layers here with their numbers among all MoE layers."""
        for layer in self._layers:
            yield layer.balance.loads.index(layer.load), layer


def balance_names(experts: bool, biases: bool) -> tuple[str, ...]:
    """What a step reports of a model's experts."""
    if not experts:
        return ()
    return (*NAMES, "moe_max_violation", *(("moe_bias_range",) if biases else ()))
