"""Which rank holds which piece of each weight; their names and shapes checked, and joined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mtk.config.model import ModelConfig
from mtk.convert.megatron.qkv import GROUPED, to_groups
from mtk.convert.megatron.ranks import Rank, Ranks
from mtk.convert.megatron.spellings import Found, spelled
from mtk.convert.megatron.weights import ROWS, Weight, weights_of
from mtk.errors import ConversionError

OUTPUT = "output_layer.weight"
QKV = "self_attention.linear_qkv."
OLD_QKV = ".query_key_value."
NAMED = 5  # names a message lists

# By (tensor, expert) rank: the file, and its tensors of one weight (one each expert).
Held = dict[tuple[int, int], tuple[Rank, Sequence[Found]]]


@dataclass(frozen=True)
class Pieces:
    """Every weight of a checkpoint. output_copy: a tied output matrix is stored again."""

    ranks: Ranks
    heads: int
    weights: Mapping[str, Weight]
    held: Mapping[str, Held]

    @property
    def output_copy(self) -> bool:
        """Whether a tied output matrix is stored again for the last stage."""
        return OUTPUT in self.held

    def whole(self, name: str) -> Tensor:
        """A weight joined from its ranks. Raises ConversionError where copies differ."""
        weight, held = self.weights[name], self.held[name]
        sizes = self.ranks.sizes
        pieces = []
        for tensor in range(sizes.tensor):
            own = [held[tensor, expert] for expert in range(sizes.expert)]
            if weight.of_experts:
                count = weight.shape[0] // sizes.expert
                stacks = [_stack(count, *rank) for rank in own]
                pieces.append(torch.cat(stacks) if len(stacks) > 1 else stacks[0])
            else:
                pieces.append(_same(name, own))
        if weight.cut is None:
            firsts = [held[tensor, 0] for tensor in range(sizes.tensor)]
            return _same(name, firsts)
        if weight.part.startswith(QKV):
            # Megatron reorders by version where the old name stands, whatever the version is.
            old = OLD_QKV in held[0, 0][1][0].raw
            version = self.ranks.version if old else GROUPED
            own_heads = self.heads // sizes.tensor
            pieces = [to_groups(piece, version, own_heads) for piece in pieces]
        return weight.join(pieces)


def collect(ranks: Ranks, config: ModelConfig, rows: int) -> Pieces:
    """Raises ConversionError for tensors missing, left over or of another shape."""
    chunks = list(ranks.sizes.chunks)
    counts = [_layers(ranks.by_number[0, stage, 0], virtual) for virtual, stage in chunks]
    # Before the arguments' layers are listed: there may be any number of them.
    if sum(counts) != config.num_layers:
        raise ConversionError(
            f"{ranks.folder}: its pipeline stages hold {sum(counts)} layers together, the "
            f"arguments say num_layers = {config.num_layers}."
        )
    weights = {weight.name: weight for weight in weights_of(config, rows)}
    optional: set[str] = set()
    if OUTPUT not in weights:
        weights[OUTPUT] = Weight(OUTPUT, (rows, config.hidden_size), ROWS, "last")
        optional.add(OUTPUT)
    held: dict[str, Held] = {}
    before = 0
    for index, ((virtual, stage), count) in enumerate(zip(chunks, counts, strict=True)):
        places: set[int | Literal["first", "last"]] = {*range(before, before + count)}
        places |= {"first"} if index == 0 else set()
        places |= {"last"} if index == len(chunks) - 1 else set()
        expected = {name for name, weight in weights.items() if weight.place in places}
        for (tensor, pipeline, expert), rank in ranks.by_number.items():
            if pipeline == stage:
                found = _found(rank, virtual, before)
                _check_names(rank, found, expected, optional)
                for name, items in found.items():
                    _check_shapes(rank, ranks, weights[name], items)
                    held.setdefault(name, {})[tensor, expert] = (rank, items)
        before += count
    _check_copies(ranks, held)
    _check_order(ranks, config, held)
    return Pieces(ranks, config.num_attention_heads, weights, held)


def _layers(rank: Rank, virtual: int) -> int:
    """How many layers a chunk holds: stages need not be alike."""
    numbers = [spelled(name, tensor).layer for name, tensor in rank.chunks[virtual].items()]
    return 1 + max((number for number in numbers if number is not None), default=-1)


def _found(rank: Rank, virtual: int, before: int) -> dict[str, list[Found]]:
    """Tensors of a chunk by their global names."""
    found: dict[str, list[Found]] = {}
    for raw, tensor in rank.chunks[virtual].items():
        item = spelled(raw, tensor)
        layer = "" if item.layer is None else f"decoder.layers.{before + item.layer}."
        found.setdefault(layer + item.name, []).append(item)
    return found


def _check_names(
    rank: Rank, found: Mapping[str, list[Found]], expected: set[str], optional: set[str]
) -> None:
    missing = sorted(expected - optional - set(found))
    extra = sorted(item.raw for name in set(found) - expected for item in found[name])
    if missing or extra:
        parts = [f"{len(missing)} missing: {', '.join(missing[:NAMED])}"] if missing else []
        parts += [f"{len(extra)} without a place: {', '.join(extra[:NAMED])}"] if extra else []
        raise ConversionError(
            f"{rank.path} does not hold the weights its arguments ask for: {'; '.join(parts)}."
        )


def _check_shapes(rank: Rank, ranks: Ranks, weight: Weight, items: Sequence[Found]) -> None:
    wanted = weight.local_shape(ranks.sizes.tensor)
    if weight.of_experts:
        wanted = _check_experts(rank, weight.name, items, wanted, ranks.sizes.expert)
    elif len(items) > 1:
        raise ConversionError(f"{rank.path} holds {items[0].raw} again as {items[1].raw}.")
    for item in items:
        if item.tensor.shape != wanted:
            raise ConversionError(
                f"{rank.path}: {item.raw} has shape {list(item.tensor.shape)}, the arguments ask "
                f"for {list(wanted)} on each of {ranks.sizes.tensor} tensor-parallel ranks."
            )


def _check_experts(
    rank: Rank, name: str, items: Sequence[Found], stack: tuple[int, ...], ranks: int
) -> tuple[int, ...]:
    """The shape that each of a rank's matrices of experts must have.

    stack: shape of all experts together. ranks: among which they are spread.
    """
    count, outputs, inputs = stack[0] // ranks, stack[1], stack[2]
    if len(items) == 1 and items[0].grouped:
        return (inputs, count * outputs) if "fc1" in name else (count * inputs, outputs)
    numbers = sorted(-1 if item.expert is None else item.expert for item in items)
    if numbers != [*range(len(numbers))] or len(numbers) * ranks != stack[0]:
        raise ConversionError(
            f"{rank.path}: {name} has experts {numbers[:8]}; each of {ranks} expert-parallel "
            f"ranks must have {stack[0]} / {ranks}, numbered from 0."
        )
    return (outputs, inputs)


def _check_copies(ranks: Ranks, held: Mapping[str, Held]) -> None:
    """Every rank has its piece, and all pieces of a weight are of one type."""
    numbers = {(tensor, expert) for tensor, _, expert in ranks.by_number}
    for name, pieces in held.items():
        absent = sorted(numbers - set(pieces))
        if absent:
            raise ConversionError(f"{ranks.folder}: rank {absent[0]} has no piece of {name}.")
        types = {item.tensor.dtype for _, items in pieces.values() for item in items}
        if len(types) > 1:
            raise ConversionError(
                f"{ranks.folder}: ranks hold {name} as {sorted(map(str, types))}."
            )


def _check_order(ranks: Ranks, config: ModelConfig, held: Mapping[str, Held]) -> None:
    """Old orders have as many keys as queries."""
    raws = (items[0].raw for pieces in held.values() for _, items in pieces.values())
    if ranks.version >= GROUPED or config.query_groups == config.num_attention_heads:
        return
    old = next((raw for raw in raws if OLD_QKV in raw), None)
    if old is not None:
        raise ConversionError(
            f"{ranks.folder}: {old} of checkpoint_version {ranks.version} has no grouped queries, "
            f"the arguments say num_query_groups = {config.query_groups}."
        )


def _same(name: str, copies: Sequence[tuple[Rank, Sequence[Found]]]) -> Tensor:
    """What all of ``copies`` hold."""
    first, items = copies[0]
    tensor = first.file.tensor(items[0].tensor)
    for rank, others in copies[1:]:
        if not torch.equal(rank.file.tensor(others[0].tensor), tensor):
            raise ConversionError(
                f"{rank.path}: {others[0].raw} ({name}) differs from the copy in {first.path}; "
                f"ranks must hold the same."
            )
    return tensor


def _stack(count: int, rank: Rank, items: Sequence[Found]) -> Tensor:
    """The matrices of a rank's ``count`` experts, [count, out, in]."""
    if items[0].grouped:
        # GroupedMLP's matrices are [in, count out] and [count in, out] by their shapes, but
        # what lies in memory is a transposed matrix for each expert, one after the other.
        matrix = rank.file.tensor(items[0].tensor).contiguous()
        inputs = matrix.shape[0] if items[0].name.endswith("fc1.weight") else -1
        outputs = -1 if inputs > 0 else matrix.shape[1]
        return matrix.view(count, inputs, outputs).transpose(1, 2)
    ordered = sorted(items, key=lambda item: item.expert or 0)
    return torch.stack([rank.file.tensor(item.tensor) for item in ordered])
