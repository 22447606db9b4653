"""From a plain model to this rank's part of it, in one fixed order.

Pipeline stages are cut first; then for each stage: tensor and sequence parallelism, experts,
the context-parallel kernel, FP8, recomputation, compilation of each block, FSDP. All of it on the
meta device: only what a rank holds is ever allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mtk.config.layout_rules import stacked_layers
from mtk.config.model import ModelConfig
from mtk.config.parallel import ParallelConfig
from mtk.config.pretrain import RuntimeConfig
from mtk.errors import LayoutError, Problem
from mtk.models.attention import AttentionKernel
from mtk.models.buffers import kept_buffers, kept_tensors
from mtk.models.build import build_on_meta
from mtk.models.gpt import GPT
from mtk.models.init import made_ahead
from mtk.models.mamba_kernels import use_kernels
from mtk.parallel.compat import prepare_symmetric_memory
from mtk.parallel.context import context_kernel
from mtk.parallel.context_fused import named_chunks
from mtk.parallel.deferred import Deferred, defer_weight_gradients
from mtk.parallel.expert import shard_experts
from mtk.parallel.fsdp import local_tensor, shard_data
from mtk.parallel.mamba import shard_mamba
from mtk.parallel.pieces import Piece
from mtk.parallel.ranks import Ranks
from mtk.parallel.recompute import apply_recompute
from mtk.parallel.schedules import SPLIT_BACKWARD
from mtk.parallel.stages import Stages, cut, mark_tied, plan_stages
from mtk.parallel.tensor import shard_tensors

# The whole values of a parameter, by its name and shape.
Values = Callable[[str, tuple[int, ...]], Tensor]
# Makes layers of a stage compute in another way (FP8); they are cut over ranks already.
Convert = Callable[[GPT], None]


@dataclass(frozen=True)
class Placed:
    """This rank's part of a model.

    parts: its (virtual) pipeline stages in order; without pipelining the one model. pieces:
    what it holds of each of its parameters and kept buffers. shapes: of all parameters of the
    whole model; buffer_shapes: of its kept buffers. frozen: names of parameters that are not
    trained. stages: where all layers are. deferred: what delays weight gradients of each part,
    for schedules that ask for it.
    """

    parts: tuple[GPT, ...]
    pieces: Mapping[str, Piece]
    shapes: Mapping[str, tuple[int, ...]]
    stages: Stages | None = None
    deferred: tuple[Deferred, ...] = ()
    buffer_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()

    @classmethod
    def whole(cls, model: GPT) -> Placed:
        """A model that one process holds."""
        shapes, buffers = _shapes(model)
        pieces = {name: Piece.whole(shape) for name, shape in {**shapes, **buffers}.items()}
        return cls((model,), pieces, shapes, buffer_shapes=buffers, frozen=_frozen(model))

    @property
    def trained(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters of the whole model that are trained."""
        return {name: shape for name, shape in self.shapes.items() if name not in self.frozen}

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """All parameters here by name. Where two stages hold the same one (tied embeddings in
        the V schedule), the first stage's counts; ``Pipeline`` makes the other follow."""
        found: dict[str, nn.Parameter] = {}
        for part in self.parts:
            for name, parameter in part.named_parameters():
                found.setdefault(name, parameter)
        return found

    def kept_buffers(self) -> dict[str, Tensor]:
        """State of the parts here that no gradient moves, by name; all ranks of a stage have
        the same."""
        return {name: b for part in self.parts for name, b in kept_buffers(part).items()}

    def cast_copies(self, dtype: torch.dtype) -> None:
        """Give second copies of a parameter the type in which the first one computes."""
        first = {id(parameter) for parameter in self.named_parameters().values()}
        for part in self.parts:
            for parameter in part.parameters():
                if id(parameter) not in first and not isinstance(parameter, DTensor):
                    parameter.data = parameter.data.to(dtype)


def place(
    config: ModelConfig,
    parallel: ParallelConfig,
    runtime: RuntimeConfig,
    ranks: Ranks,
    kernel: AttentionKernel,
    dtype: torch.dtype,
    convert: Convert | None = None,
) -> Placed:
    """Build the model under this layout; weights have no values yet (see :func:`fill`).

    kernel: for whole sequences; context parallelism wraps it. dtype: of the computation;
    without FSDP the weights are made in fp32 all the same. convert: changes how layers compute.
    """
    chunks = named_chunks(runtime.attention_backend, ranks.device)
    kernel = context_kernel(parallel.cp_comm_type, ranks.cp, kernel, chunks)
    whole = build_on_meta(config, kernel)
    shapes, buffers = _shapes(whole)
    frozen = _frozen(whole)
    copies = tuple(group for group in (ranks.tp, ranks.shards) if group.size > 1)
    all_shapes = {**shapes, **buffers}
    pieces = {name: Piece.whole(shape, copies) for name, shape in all_shapes.items()}
    stages = plan_stages(config, parallel) if ranks.pp.size > 1 else None
    parts = [whole]
    if stages is not None:
        parts = cut(config, stages, ranks.pp.rank, kernel)
        pieces = mark_tied(pieces, config, stages, ranks)
    delays = stages is not None and parallel.schedule(stacked_layers(config)) in SPLIT_BACKWARD
    held: dict[str, Piece] = {}
    deferred = []
    for part in parts:
        own = {name: pieces[name] for name in kept_tensors(part)}
        deferred.append(_apply(part, parallel, runtime, ranks, dtype, own, delays, convert))
        held |= own
    delayed = tuple(found for found in deferred if found is not None)
    return Placed(tuple(parts), held, shapes, stages, delayed, buffers, frozen)


def _shapes(model: GPT) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Of parameters, and of kept buffers."""
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return parameters, {name: tuple(b.shape) for name, b in kept_buffers(model).items()}


def _store_frozen(part: GPT, dtype: torch.dtype) -> None:
    """What is not trained needs no more precision than it computes with."""
    for parameter in part.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def _frozen(model: GPT) -> frozenset[str]:
    return frozenset(name for name, p in model.named_parameters() if not p.requires_grad)


def _apply(
    part: GPT,
    parallel: ParallelConfig,
    runtime: RuntimeConfig,
    ranks: Ranks,
    dtype: torch.dtype,
    pieces: dict[str, Piece],
    delays: bool,
    convert: Convert | None,
) -> Deferred | None:
    """All techniques in their order on one stage; ``pieces`` of its parameters follow."""
    use_kernels(part, runtime.mamba_backend)
    shard_mamba(part, ranks, parallel.sequence_parallel, pieces)
    overlap = parallel.tp_comm_overlap
    if overlap and ranks.device.type == "cuda":
        prepare_symmetric_memory(ranks.tp.handle)
    shard_tensors(part, ranks, parallel.sequence_parallel, pieces, overlap=overlap)
    shard_experts(part, ranks, parallel.sequence_parallel, pieces)
    deferred = defer_weight_gradients(part) if delays else None
    if convert is not None:
        convert(part)
    apply_recompute(part, parallel)
    _store_frozen(part, dtype)
    if runtime.compile:
        for block in part.layers.values():
            block.compile(dynamic=False)
    shard_data(part, ranks, parallel, dtype, pieces)
    return deferred


@torch.no_grad()
def fill(placed: Placed, values: Values, device: torch.device, workers: int = 1) -> None:
    """Allocate the parts on ``device`` and give every parameter its piece of ``values``; kept
    buffers begin at zero. workers: threads that ``values`` may be called from."""
    for part in placed.parts:
        part.to_empty(device=device)
        part.fill_tables(device)
        parameters = dict(part.named_parameters())
        tasks = (partial(_cut, placed.pieces[name], values, name) for name in parameters)
        made = made_ahead(tasks, workers)
        for parameter, value in zip(parameters.values(), made, strict=True):
            local_tensor(parameter).copy_(value)
        for buffer in kept_buffers(part).values():
            buffer.zero_()


def _cut(piece: Piece, values: Values, name: str) -> Tensor:
    return piece.cut(values(name, piece.shape))


def training_device(runtime: RuntimeConfig) -> torch.device:
    """The device asked for; "auto" is CUDA when there is one. Raises LayoutError."""
    available = torch.cuda.is_available()
    if runtime.device == "cuda" and not available:
        rule = "torch sees no CUDA device on this machine"
        raise LayoutError([Problem("runtime.device", "cuda", rule, "Use --device cpu.")])
    use_cuda = runtime.device == "cuda" or (runtime.device == "auto" and available)
    return torch.device("cuda" if use_cuda else "cpu")
