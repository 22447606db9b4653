"""Logits of a vocabulary shared by ranks, whole on each of them: for generation, which chooses
among all ids. Training never gathers them (:mod:`mtk.parallel.vocabulary`)."""

from __future__ import annotations

from torch import Tensor

from mtk.models.gpt import OutputHead
from mtk.parallel.collectives import all_gather
from mtk.parallel.groups import Group


class GatheredHead(OutputHead):
    """States [..., E], the same on every rank, to logits [..., V]. Each rank multiplies with its
    equal run of the padded vocabulary's rows."""

    def __init__(self, vocab_size: int, group: Group) -> None:
        super().__init__(vocab_size)
        self.group = group

    def forward(self, x: Tensor, weight_LE: Tensor) -> Tensor:
        part = self.product(x, weight_LE)
        rows, width = part.numel() // part.shape[-1], part.shape[-1]
        gathered = all_gather(part.reshape(rows, width), self.group, "tp.logits")
        whole = gathered.view(self.group.size, rows, width).transpose(0, 1)
        return whole.reshape(*part.shape[:-1], self.group.size * width)[..., : self.vocab_size]
