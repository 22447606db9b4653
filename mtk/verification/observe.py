"""One training step in some layout, with everything it computed brought to one place.

Shape suffixes: B samples, S sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mtk.config.pretrain import PretrainConfig
from mtk.data.packing import Packing
from mtk.parallel.apply import Values
from mtk.parallel.ranks import Ranks
from mtk.parallel.watchdog import differences
from mtk.training.assemble import make_stepper
from mtk.training.batch import GlobalBatch
from mtk.training.step import Stepper

# name, offset of the block in the whole tensor, the block (an array: it crosses processes)
Blocks = list[tuple[str, tuple[int, ...], npt.NDArray[np.float32]]]


@dataclass(frozen=True)
class Sample:
    """Some sequences of a step: tokens, labels int64 and loss mask fp32, each [B, S]; packed
    documents and their positions (int64) or None."""

    tokens_BS: Tensor
    labels_BS: Tensor
    loss_mask_BS: Tensor
    documents_BS: Tensor | None = None
    positions_BS: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def rows(self, start: int, stop: int) -> Sample:
        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[start:stop]

        return Sample(
            self.tokens_BS[start:stop],
            self.labels_BS[start:stop],
            self.loss_mask_BS[start:stop],
            cut(self.documents_BS),
            cut(self.positions_BS),
            {name: x[start:stop] for name, x in self.extra.items()},
        )


@dataclass(frozen=True)
class Observation:
    """What one rank saw. gradients, weights, buffers: the blocks it owns, the last two after the
    step. balance: figures of the balance of experts (none without). drifted: what to say of each
    tensor whose copies are not the same bytes after the step on all ranks that hold it."""

    loss: float
    norm: float
    gradients: Blocks
    weights: Blocks
    balance: tuple[float, ...] = ()
    buffers: Blocks = field(default_factory=list)
    drifted: tuple[str, ...] = ()


def random_sample(config: PretrainConfig, seed: int = 0) -> Sample:
    """A global batch of random tokens with an uneven loss mask: classic averaging mistakes
    (per micro-batch, per rank) change its loss."""
    generator = torch.Generator().manual_seed(seed)
    count, length = config.batch.full, config.model.seq_length
    assert config.model.vocab_size is not None
    text = torch.randint(0, config.model.vocab_size, (count, length + 1), generator=generator)
    keep = torch.rand(count, 1, generator=generator)
    mask = (torch.rand(count, length, generator=generator) < keep).float()
    tokens_BS = text[:, :-1]
    # Whatever ends documents in real data, here it is token 0.
    packing = Packing(0, config.data.reset_attention_mask, config.data.reset_position_ids)
    documents, positions = packing.documents(tokens_BS), packing.position_ids(tokens_BS)
    sample = Sample(tokens_BS, text[:, 1:], mask, documents, positions)
    if config.model.family == "bert":
        return _with_segments(sample, config.model.num_tokentypes, generator)
    if config.model.family == "t5":
        return _with_decoder(sample, config, generator)
    return sample


def _with_decoder(sample: Sample, config: PretrainConfig, generator: torch.Generator) -> Sample:
    """Padded encoder tokens, and a decoder with tokens, labels and mask of its own."""
    (count, length), decoded = sample.tokens_BS.shape, config.model.decoder_seq_length
    vocab = config.model.vocab_size or 1
    text = torch.randint(0, vocab, (count, decoded + 1), generator=generator)
    keep = torch.rand(count, 1, generator=generator)
    mask = torch.rand(count, decoded, generator=generator) < keep
    lengths = torch.randint(1, length + 1, (count, 1), generator=generator)
    return Sample(
        sample.tokens_BS,
        text[:, 1:],
        mask.float(),
        (torch.arange(length) >= lengths).long(),
        extra={"decoder_tokens": text[:, :-1]},
    )


def _with_segments(sample: Sample, types: int, generator: torch.Generator) -> Sample:
    """As BERT has them: padding of uneven length, segments, their order, some uncounted."""
    count, length = sample.tokens_BS.shape
    places, lengths = (
        torch.arange(length),
        torch.randint(1, length + 1, (count, 1), generator=generator),
    )
    padding = (places >= lengths).long()
    extra = {
        "types": torch.randint(0, types, (count, length), generator=generator),
        "order": torch.randint(-1, 2, (count,), generator=generator),
    }
    return dataclasses.replace(
        sample,
        loss_mask_BS=sample.loss_mask_BS * (1 - padding),
        documents_BS=padding,
        extra=extra,
    )


def share(sample: Sample, micro: int, rank: int, size: int) -> GlobalBatch:
    """The micro-batches of one data-parallel rank, dealt out as the sampler does."""
    count = len(sample.tokens_BS)
    starts = range(rank * micro, count, micro * size)
    return GlobalBatch([sample.rows(k, k + micro) for k in starts], count)


def observe(
    config: PretrainConfig,
    sample: Sample,
    ranks: Ranks,
    steps: int = 1,
    values: Values | None = None,
) -> Observation:
    """Initial weights (``values``: others), ``steps`` training steps on ``sample``; gradients are
    the last ones."""
    stepper = make_stepper(config, config.batch.full * 10, ranks, values)
    batch = share(sample, config.batch.micro_batch_size, ranks.dp.rank, ranks.dp.size)
    for step in range(steps - 1):
        stepper.step(batch, config.batch.full * step)
    stepper.main.clear_gradients()
    scale = stepper.loss_scale.scale
    loss, norm, balance = stepper.gradients(batch)
    found = stepper.main.gradients
    gradients = owned(stepper, {n: g.float() / scale for n, g in found.items() if g is not None})
    stepper.update(norm, scale, config.optimizer.lr, config.optimizer.weight_decay)
    return Observation(
        loss.sum().item(),
        norm.item(),
        gradients,
        owned(stepper, stepper.main.weights),
        tuple(float(value) for value in balance),
        owned(stepper, stepper.buffers),
        tuple(differences(*stepper.state())),
    )


def owned(stepper: Stepper, tensors: Mapping[str, Tensor | None]) -> Blocks:
    """Copies of the blocks that this rank owns, on the CPU."""
    blocks = []
    for name, tensor in tensors.items():
        piece = stepper.pieces[name]
        if piece.owner and tensor is not None and tensor.numel():
            blocks.append((name, piece.offset, tensor.detach().float().cpu().numpy().copy()))
    return blocks


def join(blocks: Iterable[Blocks], shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Whole tensors from the blocks of all ranks. Raises ValueError where they do not cover
    a tensor exactly once."""
    whole = {name: torch.zeros(*shape) for name, shape in shapes.items()}
    covered = {name: torch.zeros(*shape, dtype=torch.int8) for name, shape in shapes.items()}
    for name, offset, block in (block for rank in blocks for block in rank):
        region = tuple(slice(o, o + n) for o, n in zip(offset, block.shape, strict=True))
        whole[name][region] = torch.from_numpy(block)
        covered[name][region] += 1
    for name, count in covered.items():
        if not bool((count == 1).all()):
            raise ValueError(f"{name} is not covered exactly once by the ranks' blocks")
    return whole
