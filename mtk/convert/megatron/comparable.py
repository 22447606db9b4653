"""Megatron's files as one side of a comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from mtk.convert.lazy import LazyTensors, Tensors
from mtk.convert.megatron.open_checkpoint import MegatronModel
from mtk.convert.megatron.ranks import Rank
from mtk.convert.megatron.reference_bert import BertReferenceForward
from mtk.convert.megatron.reference_forward import Files, ReferenceForward
from mtk.convert.reference_models import rounded
from mtk.errors import ConversionError


class MegatronFiles:
    """The reference forward over the ranks' own tensors, never joined, in fp64; of their values
    what ``dtype`` keeps. Tensors are read when their layer is computed and not kept."""

    def __init__(self, model: MegatronModel, dtype: torch.dtype | None = None) -> None:
        self.name = "mtk reference forward of Megatron's ranks"
        if model.known:
            listed = ", ".join(f"{name} = {value}" for name, value in model.known.items())
            self.name += f" (as published: {listed})"
        ranks, sizes = model.ranks, model.ranks.sizes

        def loaded(rank: Rank, virtual: int) -> Tensors:
            chunk = rank.chunks[virtual]
            return LazyTensors(
                chunk, lambda name: rounded(name, rank.file.tensor(chunk[name]), dtype).double()
            )

        stages = [
            [
                [
                    loaded(ranks.by_number[tensor, stage, expert], virtual)
                    for expert in range(sizes.expert)
                ]
                for tensor in range(sizes.tensor)
            ]
            for virtual in range(sizes.virtual)
            for stage in range(sizes.pipeline)
        ]
        self._folder = ranks.folder
        kind = BertReferenceForward if model.config.family == "bert" else ReferenceForward
        self._forward = kind(Files(model.args, ranks.version, stages))

    def forward(self, tokens_BS: Tensor) -> tuple[Tensor, list[Tensor]]:
        """See :class:`mtk.convert.reference_models.Comparable`. Raises ConversionError for files
        whose shapes no layout of Megatron could compute with."""
        try:
            return self._forward(tokens_BS)
        except (RuntimeError, IndexError) as error:
            raise ConversionError(
                f"{self._folder}: its ranks' tensors do not fit each other ({error})."
            ) from error
