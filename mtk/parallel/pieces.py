"""What a rank holds of each parameter: the one table that initial weights, gradients,
norms, checkpoints and the replica watchdog go by."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from mtk.parallel.groups import Group


@dataclass(frozen=True)
class Piece:
    """A block of a parameter.

    shape: of the whole parameter; offset, size: the block, per dimension. copies: groups
    whose ranks all hold this same block. partial: groups over which its gradient comes as
    parts to be summed after backward (FSDP's own reduction is not among them).
    """

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    copies: tuple[Group, ...] = ()
    partial: tuple[Group, ...] = field(default=())

    @classmethod
    def whole(cls, shape: tuple[int, ...], copies: tuple[Group, ...] = ()) -> Piece:
        return cls(tuple(shape), (0,) * len(shape), tuple(shape), copies)

    @property
    def owner(self) -> bool:
        """This rank counts and writes the block; the other holders of it do not."""
        return all(group.first for group in self.copies)

    def narrow(self, dim: int, start: int, length: int) -> Piece:
        """The part of this block from ``start`` on along ``dim``."""
        offset, size = list(self.offset), list(self.size)
        offset[dim] += start
        size[dim] = length
        return replace(self, offset=tuple(offset), size=tuple(size))

    def sharded(self, dim: int, group: Group) -> Piece:
        """This rank's equal part along ``dim``, no longer a copy over ``group``.

        Raises ValueError where the parts would not be equal; the configuration's rules say
        so to the user before.
        """
        length, rest = divmod(self.size[dim], group.size)
        if rest:
            raise ValueError(f"{self.size[dim]} does not divide over {group.size} {group.name}")
        return self.narrow(dim, group.rank * length, length).without_copies(group)

    def without_copies(self, group: Group) -> Piece:
        return replace(self, copies=tuple(g for g in self.copies if g.name != group.name))

    def with_copies(self, group: Group) -> Piece:
        return replace(self, copies=(*self.copies, group)) if group.size > 1 else self

    def with_partial(self, group: Group) -> Piece:
        """Each rank of ``group`` has the block, but only a part of its gradient."""
        return replace(self, partial=(*self.partial, group)) if group.size > 1 else self

    @property
    def region(self) -> tuple[slice, ...]:
        """Index of the block in the whole parameter."""
        pairs = zip(self.offset, self.size, strict=True)
        return tuple(slice(start, start + size) for start, size in pairs)

    def cut(self, whole: Tensor) -> Tensor:
        """The block out of the whole parameter (a view)."""
        return whole[self.region]
