"""Training with parts of the user's own: loss, forward step, batches.

Everything else (layouts, precision, checkpoints, resuming, evaluation) stays as it is, so that a
custom loss works under any layout. Parts are functions or classes at the top of a module that
can be imported: ranks are processes of their own and import what they run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtk.config.pretrain import PretrainConfig
from mtk.parallel.collectives import all_gather
from mtk.parallel.pipeline import Call
from mtk.training.batch import GlobalBatch, LocalBatch
from mtk.training.loop import RunData
from mtk.training.objective import Objective, TokenLosses
from mtk.training.step import Stepper


@dataclass(frozen=True)
class Custom:
    """What is used in place of mtk's own.

    objective: given the cross-entropy of this layout ([B, S] from logits and labels; logits may
    be a rank's part of the vocabulary), makes what is minimised. forward: runs a module, or a
    pipeline stage of it, on a local batch. batches(config, rank, size): what one of ``size``
    data-parallel ranks reads; micro-batches of ``config.batch.micro_batch_size`` samples, and as
    many on each rank. data_digest: must then change whenever the samples do; resuming goes by it.
    """

    objective: Callable[[TokenLosses], Objective] | None = None
    forward: Call | None = None
    batches: Callable[[PretrainConfig, int, int], RunData] | None = None
    data_digest: str = ""

    def parts(self) -> list[Callable[..., object]]:
        """What was given."""
        given = (self.objective, self.forward, self.batches)
        return [part for part in given if part is not None]

    def __getstate__(self) -> dict[str, Any]:
        """Pickled on the way to other processes. Raises TypeError for parts that these cannot
        import, before any of them starts."""
        for part in self.parts():
            name = getattr(part, "__qualname__", repr(part))
            if getattr(part, "__module__", "__main__") == "__main__" or "<locals>" in name:
                raise TypeError(
                    f"{name}: ranks import what they run, so it must stand at the top of a module "
                    f"that can be imported, not of the program or inside a function."
                )
        return dict(vars(self))

    def __post_init__(self) -> None:
        """Raises ValueError where own batches could not be told from others on resuming."""
        if (self.batches is None) != (self.data_digest == ""):
            raise ValueError("batches and data_digest belong together: give both or neither")


NOTHING_OWN = Custom()


@torch.no_grad()
def logits_of(stepper: Stepper, batch: GlobalBatch) -> list[Tensor]:
    """Logits [B, S, V] of each of this rank's micro-batches, over the whole vocabulary.

    Every rank must call it; ``RunData.judge`` is given the stepper of a run. Tensor-parallel
    ranks all get them; of a pipeline only the ranks of its last stage, the others an empty
    list. Of a sequence cut by context parallelism each rank gets those of its own tokens, in
    the order of its batch.
    """
    found: list[Tensor] = []
    tp = stepper.ranks.tp

    def keep(outputs: Any, local: LocalBatch) -> None:
        del local
        # BERT's come with the order of its segments.
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        if tp.size == 1:
            found.append(outputs)
            return
        # The last ranks may have fewer columns, as padding is left out: make them alike first.
        rows = stepper.placed.parts[-1].config.padded_vocab_size // tp.size
        wide = torch.nn.functional.pad(outputs, (0, rows - outputs.shape[-1]))
        parts = all_gather(wide[None].contiguous(), tp, "custom.logits")
        vocab = stepper.placed.parts[-1].config.vocab_size
        found.append(torch.cat(list(parts), dim=-1)[..., :vocab])

    stepper.passes.evaluate(batch.micro_batches, keep)
    return found
