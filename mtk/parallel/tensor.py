"""Tensor parallelism (Shoeybi et al. 2019) and sequence parallelism (Korthikanti et al. 2022).

Matrices that read the residual stream are cut by output rows, those that write to it by input
columns; key/value heads are copied where there are fewer of them than ranks. With sequence
parallelism the residual stream is cut too: of the B x S tokens of a micro-batch each rank has
an equal run of rows, so that norms and dropout work on 1/tp of them.

Shape suffixes: B batch, S local sequence, R rows of this rank, E hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtk.models.attention import Attention
from mtk.models.bert import Bert
from mtk.models.block import Block
from mtk.models.gpt import GPT, Embedding, Product
from mtk.models.layer import SingleBlock
from mtk.models.lora import LoraLinear
from mtk.models.mlp import MLP
from mtk.models.t5 import T5, DecoderBlock
from mtk.parallel.collectives import (
    copy_to_parts,
    gather_rows,
    scatter_sum_of_parts,
    sum_of_parts,
)
from mtk.parallel.groups import Group
from mtk.parallel.pieces import Piece
from mtk.parallel.ranks import Ranks
from mtk.parallel.rng import OwnPartDropout, SharedDropout
from mtk.parallel.stages import SHARED_BIASES
from mtk.parallel.tensor_overlap import overlap_attention, overlap_mlp
from mtk.parallel.vocabulary import VocabParallelEmbedding, VocabParallelHead

Pieces = dict[str, Piece]
# Modules that see whole sequences on every rank, also under sequence parallelism.
COMPUTED_ALIKE = ("pooler.", "order.", "classifier.")


class Region:
    """The way into and out of the modules that are shared by tensor-parallel ranks.

    sequence: tokens of a sample on this rank, to give gathered rows their shape back; None
    without sequence parallelism. overlap: layers of this region hide what they send.
    """

    def __init__(self, group: Group, sequence: int | None, *, overlap: bool = False) -> None:
        self.group, self.sequence, self.overlap = group, sequence, overlap

    def enter(self, x: Tensor, site: str) -> Tensor:
        """Residual stream -> [B, S, E] of which every rank computes a part."""
        if self.sequence is None:
            return copy_to_parts(x, self.group, site)
        gathered = gather_rows(x, self.group, site)
        return gathered.view(-1, self.sequence, gathered.shape[-1])

    def leave(self, x_BSE: Tensor, site: str) -> Tensor:
        """Partial results [B, S, E] -> the residual stream."""
        if self.sequence is None:
            return sum_of_parts(x_BSE, self.group, site)
        return scatter_sum_of_parts(x_BSE.flatten(0, 1), self.group, site)

    def whole(self, x: Tensor) -> Tensor:
        """Residual stream -> [B, S, E] for what every rank computes alike."""
        if self.sequence is None:
            return x
        gathered = gather_rows(x, self.group, "tp.pooler", replicated=True)
        return gathered.view(-1, self.sequence, gathered.shape[-1])


class RowParallelLinear(nn.Linear):
    """A linear layer cut by input columns; the bias is added once, after the sum. lora: its
    adapter, cut alike."""

    def __init__(self, linear: nn.Linear, region: Region, site: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.region, self.site = region, site
        self.lora = linear.lora if isinstance(linear, LoraLinear) else None
        if self.lora is not None and self.lora.p and region.sequence is None:
            self.lora.dropout = OwnPartDropout(self.lora.p, region.group)
        self.product: Product = F.linear

    def forward(self, x: Tensor) -> Tensor:
        part = self.product(x, self.weight)
        if self.lora is not None:
            part = part + self.lora(x)
        out = self.region.leave(part, self.site)
        return out if self.bias is None else out + self.bias


def shard_tensors(
    model: GPT, ranks: Ranks, sequence_parallel: bool, pieces: Pieces, *, overlap: bool = False
) -> None:
    """Cut the parameters of ``model`` (best on the meta device) and hook in the collectives.

    overlap: of decoders, hide what sequence parallelism sends (see
    :mod:`mtk.parallel.tensor_overlap`). pieces: updated to what this rank holds. Sizes must
    divide (``ParallelConfig``'s rules).
    MoE layers are left to :mod:`mtk.parallel.expert`, Mamba layers to :mod:`mtk.parallel.mamba`.
    """
    if ranks.tp.size == 1:
        return
    sequence = model.config.seq_length // ranks.cp.size
    region = Region(ranks.tp, sequence if sequence_parallel else None, overlap=overlap)
    # Where the output is made; all of a decoder-only model, or of an encoder.
    last = region
    if isinstance(model, T5):
        last = Region(ranks.tp, model.config.decoder_seq_length if sequence_parallel else None)
    cutter = Cutter(ranks, pieces)
    for index, block in model.layers.items():
        assert isinstance(block, Block | SingleBlock)
        name = f"layers.{index}"
        own = last if isinstance(block, DecoderBlock) else region
        if block.attention is not None:
            _shard_attention(block.attention, f"{name}.attention", own, cutter)
        if isinstance(block, DecoderBlock):
            cross = block.cross_attention
            _shard_attention(cross, f"{name}.cross_attention", own, cutter)
            cross.register_forward_pre_hook(_memory_entering(region))
        if isinstance(block.mlp, MLP):
            _shard_mlp(block.mlp, f"{name}.mlp", own, cutter)
    if model.embedding is not None:  # the last stage's copy of a tied matrix is cut alike
        _shard_embedding(model.embedding, region, cutter)
    if model.output is not None:
        cutter.cut(model.output, "weight", 0, "output.weight")
    _shard_score_biases(model, cutter)
    model.head = VocabParallelHead(model.config.vocab_size or 0, last.enter, ranks.tp)
    if isinstance(model, Bert | T5) and model.output_bias is not None:
        cutter.cut(model, "output_bias", 0, "output_bias")
    if isinstance(model, Bert) and model.pooler is not None:
        model.pooler.whole = region.whole
    if isinstance(model, Bert) and model.classifier is not None and region.sequence is not None:
        model.classifier.dropout = SharedDropout(model.classifier.p, region.group)
    if sequence_parallel:
        _sum_gradients_of_rows(model, ranks.tp, pieces)


def _shard_attention(attention: Attention, name: str, region: Region, cutter: Cutter) -> None:
    cutter.rows(attention.query, f"{name}.query")
    for part in ("key", "value"):
        cutter.heads(getattr(attention, part), f"{name}.{part}", attention.head_size)
    for part in ("query_norm", "key_norm"):
        cutter.of_own_heads(getattr(attention, part), f"{name}.{part}")
    cutter.columns(attention.output, f"{name}.output")
    if region.overlap and region.sequence is not None:
        overlap_attention(attention, region.group, region.sequence, "tp.attention")
        return
    attention.register_forward_pre_hook(entering(region, "tp.attention"), with_kwargs=False)
    attention.output = RowParallelLinear(attention.output, region, "tp.attention.output")


def _shard_mlp(mlp: MLP, name: str, region: Region, cutter: Cutter) -> None:
    for part in ("gate", "up"):
        linear = getattr(mlp, part)
        if linear is not None:
            cutter.rows(linear, f"{name}.{part}")
    cutter.columns(mlp.down, f"{name}.down")
    if region.overlap and region.sequence is not None:
        overlap_mlp(mlp, region.group, region.sequence, "tp.mlp")
        return
    mlp.register_forward_pre_hook(entering(region, "tp.mlp"))
    mlp.down = RowParallelLinear(mlp.down, region, "tp.mlp.down")


def _shard_embedding(embedding: Embedding, region: Region, cutter: Cutter) -> None:
    cutter.cut(embedding.tokens, "weight", 0, "embedding.tokens.weight")
    shared = VocabParallelEmbedding(embedding.tokens, region.leave, region.group)
    embedding.tokens = shared  # type: ignore[assignment]
    if region.sequence is not None:
        embedding.register_forward_pre_hook(_rows_of_positions(region.group))


def _shard_score_biases(model: GPT, cutter: Cutter) -> None:
    """Each rank biases the scores of its own heads."""
    tp, heads = cutter.ranks.tp, model.config.num_attention_heads // cutter.ranks.tp.size
    model.own_heads = slice(tp.rank * heads, (tp.rank + 1) * heads)
    if model.config.position_embedding_type == "alibi":
        model.fill_tables(model.alibi_slopes.device)  # type: ignore[arg-type]
    for name in SHARED_BIASES:
        table = getattr(model, name, None)
        if table is not None:
            cutter.cut(table, "weight", 1, f"{name}.weight")


def entering(region: Region, site: str) -> Any:
    """A hook that lets a module's first input enter the region."""

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        del module
        return (region.enter(inputs[0], site), *inputs[1:])

    return hook


def _memory_entering(region: Region) -> Any:
    """The encoder's states enter as the decoder's do."""

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        del module
        return (*inputs[:-1], region.enter(inputs[-1], "tp.memory"))

    return hook


def _rows_of_positions(group: Group) -> Any:
    """Positions and segments are added to this rank's rows only."""

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        del module
        tokens_BS, *others = inputs
        rows = (x.expand_as(tokens_BS).flatten() for x in others)
        return tokens_BS, *(x.chunk(group.size)[group.rank] for x in rows)

    return hook


def _sum_gradients_of_rows(model: GPT, tp: Group, pieces: Pieces) -> None:
    """What is applied to a rank's rows alone has a partial gradient on each rank."""
    for name, _ in model.named_parameters():
        if name.startswith(COMPUTED_ALIKE):
            continue
        piece = pieces[name]
        if any(group.name == tp.name for group in piece.copies) and not piece.partial:
            pieces[name] = piece.with_partial(tp)


class Cutter:
    """Replaces parameters by this rank's part and notes it in the table."""

    def __init__(self, ranks: Ranks, pieces: Pieces) -> None:
        self.ranks, self.pieces = ranks, pieces

    def cut(self, module: nn.Module, attribute: str, dim: int, name: str) -> None:
        self._replace(module, attribute, name, self.pieces[name].sharded(dim, self.ranks.tp))

    def rows(self, module: nn.Module, name: str) -> None:
        """Output rows of weight and bias."""
        for attribute in ("weight", "bias"):
            if getattr(module, attribute) is not None:
                self.cut(module, attribute, 0, f"{name}.{attribute}")
        if isinstance(module, LoraLinear):
            self.cut(module.lora, "b", 0, f"{name}.lora.b")
            self._in_parts(f"{name}.lora.a")

    def columns(self, linear: nn.Linear, name: str) -> None:
        """Input columns of the weight; the bias stays whole."""
        self.cut(linear, "weight", 1, f"{name}.weight")
        if isinstance(linear, LoraLinear):
            self.cut(linear.lora, "a", 1, f"{name}.lora.a")
            self._in_parts(f"{name}.lora.b")

    def _in_parts(self, name: str) -> None:
        """Whole on every rank, which has a part of its gradient."""
        self.pieces[name] = self.pieces[name].with_partial(self.ranks.tp)

    def heads(self, linear: nn.Linear, name: str, head_size: int) -> None:
        """As :meth:`rows`, but one whole head where there are fewer heads than ranks; the
        ranks that share a head each see only some of its queries."""
        self.shared_rows(linear, name, head_size, self.ranks.kv)

    def shared_rows(self, module: nn.Module, name: str, size: int, sharing: Group) -> None:
        """As :meth:`rows`, or the same run of ``size`` rows on all ranks of ``sharing``, each
        of which has a part of its gradient."""
        if sharing.size == 1:
            self.rows(module, name)
            return
        start = self.ranks.tp.rank // sharing.size * size
        own = [(module, "weight", name), (module, "bias", name)]
        if isinstance(module, LoraLinear):
            own.append((module.lora, "b", f"{name}.lora"))
            self._in_parts(f"{name}.lora.a")
        for holder, attribute, prefix in own:
            if getattr(holder, attribute) is not None:
                full = f"{prefix}.{attribute}"
                piece = self.pieces[full].narrow(0, start, size).without_copies(self.ranks.tp)
                piece = piece.with_copies(sharing).with_partial(sharing)
                self._replace(holder, attribute, full, piece)

    def of_own_heads(self, norm: nn.Module | None, name: str) -> None:
        """Whole weights on every rank, whose gradient there is that of its own heads."""
        for part, _ in () if norm is None else norm.named_parameters():
            self._in_parts(f"{name}.{part}")

    def _replace(self, module: nn.Module, attribute: str, name: str, piece: Piece) -> None:
        old = getattr(module, attribute)
        local = torch.empty(piece.size, dtype=old.dtype, device=old.device)
        setattr(module, attribute, nn.Parameter(local, requires_grad=old.requires_grad))
        self.pieces[name] = piece
