"""The replica watchdog (``--replica-check-interval``): what ranks hold as copies must be the same
bytes.

Ranks that share a block of a parameter (``Piece.copies``) compute the same updates; if a
collective is missing, doubled or a memory chip flips a bit, they drift apart in silence. The
watchdog compares 64-bit hashes over each group, in one collective a group, and names the
tensor and the ranks that differ from the majority.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtk.errors import GateError
from mtk.parallel.collectives import all_gather, gather_objects
from mtk.parallel.groups import Group
from mtk.parallel.pieces import Piece

# Odd, as an even factor would lose bits (Knuth's 2^64 / golden ratio, as a signed integer).
FACTOR = -7046029254386353131
# Bytes that are hashed at a time: bounds the memory the watchdog takes.
CHUNK = 1 << 24
# How many tensors a message names.
NAMED = 8


def compare_copies(
    pieces: Mapping[str, Piece], tensors: Mapping[str, Tensor], world: Group | None = None
) -> None:
    """Check that every rank of every group in ``Piece.copies`` has the same bytes.

    tensors: local blocks by name (of a dtype whose elements have 1, 2, 4 or 8 bytes); those
    without a piece are not compared. All ranks of a group must hold the same names, and all
    ranks call this at the same time. world: all ranks; with it those that hold good copies
    raise as well, with the same message. Raises GateError naming tensors and global ranks.
    """
    wrong = differences(pieces, tensors)
    if world is not None:
        found = gather_objects(wrong, world, "watchdog.agree")
        wrong = list(dict.fromkeys(text for texts in found for text in texts))
    if wrong:
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise GateError(
            f"copies that must be equal differ: {'; '.join(wrong[:NAMED])}{more}. A rank computed "
            f"or stored something else: continue from the last checkpoint (without that machine, "
            f"if it happens again), and check the layout with mtk verify layout."
        )


def differences(pieces: Mapping[str, Piece], tensors: Mapping[str, Tensor]) -> list[str]:
    """What to say of each tensor whose copies differ in a group of this rank."""
    shared = sorted(name for name in tensors if name in pieces)
    hashes = {name: tensor_hash(tensors[name]) for name in shared if _compared(pieces[name])}
    wrong: list[str] = []
    for group, names in _groups(pieces, list(hashes)):
        mine = torch.stack([hashes[name] for name in names])
        all_RN = all_gather(mine[None], group, f"watchdog.{group.name}").cpu()
        for column, name in enumerate(names):
            wrong += _differing(name, all_RN[:, column].tolist(), group)
    return wrong


def _compared(piece: Piece) -> bool:
    return any(group.size > 1 for group in piece.copies)


def _groups(pieces: Mapping[str, Piece], names: Sequence[str]) -> list[tuple[Group, list[str]]]:
    """Each group of more than one rank with its tensors, in an order that all ranks share."""
    found: dict[tuple[str, tuple[int, ...]], tuple[Group, list[str]]] = {}
    for name in names:
        for group in pieces[name].copies:
            if group.size > 1:
                found.setdefault((group.name, group.ranks), (group, []))[1].append(name)
    return [found[key] for key in sorted(found)]


def _differing(name: str, hashes: Sequence[int], group: Group) -> list[str]:
    """What to say of a tensor: nothing if equal; else who differs from most ranks."""
    counts = Counter(hashes).most_common(2)
    if len(counts) == 1:
        return []
    if counts[0][1] == counts[1][1]:
        return [f"{name} (no majority among ranks {_listed(group.ranks)} of {group.name})"]
    pairs = zip(group.ranks, hashes, strict=True)
    odd = [rank for rank, value in pairs if value != counts[0][0]]
    return [f"{name} (rank {_listed(odd)} against the others of {group.name})"]


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


@torch.no_grad()
def tensor_hash(x: Tensor) -> Tensor:
    """64 bits of the bytes of ``x`` and their order, as an int64 scalar on its device.

    Polynomial in an odd factor modulo 2^64 over 8-byte words, so any single changed word
    changes it; equal bytes give equal hashes whatever the kernel, as integers add exactly.
    """
    words = _words(x.detach())
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for start in range(0, words.numel(), CHUNK // 8):
        part = words[start : start + CHUNK // 8]
        total = total * FACTOR + (_mixed(part) * _multipliers(part.numel(), x.device)).sum()
    return total + x.numel()


def _words(x: Tensor) -> Tensor:
    """The bytes of ``x`` as int64, padded with zeros."""
    flat = x.contiguous().view(-1).view(torch.uint8)
    if missing := -flat.numel() % 8:
        flat = torch.nn.functional.pad(flat, (0, missing))
    # A view wants storage aligned to its elements; a slice of a larger tensor may not be.
    return (flat if flat.storage_offset() % 8 == 0 else flat.clone()).view(torch.int64)


def _mixed(words: Tensor) -> Tensor:
    """Bits of a word spread over all of it: high bits would otherwise only reach high bits."""
    words = words ^ (words >> 32)
    words = words * FACTOR
    return words ^ (words >> 29)


def _multipliers(count: int, device: torch.device) -> Tensor:
    """Odd numbers that differ by position."""
    index = torch.arange(count, dtype=torch.int64, device=device)
    return _mixed(index) | 1
