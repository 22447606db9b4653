"""Conversion as data: small rules, one for each weight, used in both directions.

A :class:`WeightTable` lists the rules of one model. Its two views rename and reshape
lazily, and refuse any weight that would stay unread or unwritten.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from mtk.convert.lazy import LazyTensors, Tensors
from mtk.errors import ConversionError


class Rule(Protocol):
    """How some native weights and some foreign ones are made from each other."""

    @property
    def natives(self) -> tuple[str, ...]: ...
    @property
    def foreigns(self) -> tuple[str, ...]: ...
    def to_foreign(self, native: Sequence[Tensor]) -> tuple[Tensor, ...]: ...
    def to_native(self, foreign: Sequence[Tensor]) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class Rename:
    """The same tensor under another name."""

    native: str
    foreign: str

    @property
    def natives(self) -> tuple[str, ...]:
        return (self.native,)

    @property
    def foreigns(self) -> tuple[str, ...]:
        return (self.foreign,)

    def to_foreign(self, native: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (native[0],)

    def to_native(self, foreign: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (foreign[0],)


@dataclass(frozen=True)
class Transpose(Rename):
    """[out, in] here, [in, out] there, as in GPT-2's Conv1D."""

    def to_foreign(self, native: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (native[0].T.contiguous(),)

    def to_native(self, foreign: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (foreign[0].T.contiguous(),)


@dataclass(frozen=True)
class CutRows(Rename):
    """Rows (of a bias: values) that only pad the vocabulary exist on the native side.

    They never take part in the model, so they are cut on the way out and zero on the
    way in. rows: the true vocabulary; padded: rows of the native matrix.
    """

    rows: int
    padded: int

    def to_foreign(self, native: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (native[0][: self.rows].contiguous(),)

    def to_native(self, foreign: Sequence[Tensor]) -> tuple[Tensor, ...]:
        _check_size(foreign[0], 0, self.rows, self.foreign)
        extra = self.padded - self.rows
        return (torch.nn.functional.pad(foreign[0], (0, 0) * (foreign[0].ndim - 1) + (0, extra)),)


@dataclass(frozen=True)
class Fuse:
    """Several native weights stacked into one along their outputs, e.g. query, key, value.

    sizes: outputs of each part. transposed: stored [in, out] on the foreign side.
    """

    natives: tuple[str, ...]
    foreign: str
    sizes: tuple[int, ...]
    transposed: bool = False

    @property
    def foreigns(self) -> tuple[str, ...]:
        return (self.foreign,)

    def to_foreign(self, native: Sequence[Tensor]) -> tuple[Tensor, ...]:
        whole = torch.cat(list(native))
        return (whole.T.contiguous() if self.transposed else whole,)

    def to_native(self, foreign: Sequence[Tensor]) -> tuple[Tensor, ...]:
        whole = foreign[0].T if self.transposed else foreign[0]
        _check_size(foreign[0], -1 if self.transposed else 0, sum(self.sizes), self.foreign)
        return tuple(part.contiguous() for part in torch.split(whole, list(self.sizes)))


@dataclass(frozen=True)
class FuseHeads(Fuse):
    """As :class:`Fuse`, but one head of each part after the other, as GPT-NeoX and BLOOM keep
    query, key and value. head_size: outputs of a head."""

    head_size: int = 1

    def to_foreign(self, native: Sequence[Tensor]) -> tuple[Tensor, ...]:
        heads = [torch.unflatten(part, 0, (-1, self.head_size)) for part in native]
        return (torch.stack(heads, dim=1).flatten(0, 2),)

    def to_native(self, foreign: Sequence[Tensor]) -> tuple[Tensor, ...]:
        _check_size(foreign[0], 0, sum(self.sizes), self.foreign)
        heads = torch.unflatten(foreign[0], 0, (-1, len(self.sizes), self.head_size))
        return tuple(part.flatten(0, 1).contiguous() for part in heads.unbind(1))


@dataclass(frozen=True)
class PairedRows(Rename):
    """Rotated channels: pairs (2c, 2c + 1) here, as in Meta's and Megatron's interleaved form,
    (c, c + R/2) there. head_size: rows of a head; rotated: the first R of them."""

    head_size: int
    rotated: int

    def to_foreign(self, native: Sequence[Tensor]) -> tuple[Tensor, ...]:
        order = torch.arange(self.head_size)
        order[: self.rotated] = torch.arange(self.rotated).view(-1, 2).T.flatten()
        return (self._reordered(native[0], order),)

    def to_native(self, foreign: Sequence[Tensor]) -> tuple[Tensor, ...]:
        order = torch.arange(self.head_size)
        order[: self.rotated] = torch.arange(self.rotated).view(2, -1).T.flatten()
        return (self._reordered(foreign[0], order),)

    def _reordered(self, rows: Tensor, order: Tensor) -> Tensor:
        return torch.unflatten(rows, 0, (-1, self.head_size))[:, order].flatten(0, 1)


@dataclass(frozen=True)
class StackExperts:
    """One native weight [X, ...], a foreign one for each of its X experts.

    foreign: their names, with ``{e}`` for the number.
    """

    native: str
    foreign: str
    experts: int

    @property
    def natives(self) -> tuple[str, ...]:
        return (self.native,)

    @property
    def foreigns(self) -> tuple[str, ...]:
        return tuple(self.foreign.format(e=expert) for expert in range(self.experts))

    def to_foreign(self, native: Sequence[Tensor]) -> tuple[Tensor, ...]:
        _check_size(native[0], 0, self.experts, self.native)
        return native[0].unbind(0)

    def to_native(self, foreign: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Reads one expert after the other: beside the stack never more than one is there."""
        first = foreign[0]
        stack = first.new_empty((self.experts, *first.shape))
        for expert, name in enumerate(self.foreigns):
            part = first if expert == 0 else foreign[expert]
            if (part.shape, part.dtype) != (first.shape, first.dtype):
                raise ConversionError(
                    f"{name} is {part.dtype} {list(part.shape)}, but {self.foreigns[0]} is "
                    f"{first.dtype} {list(first.shape)}; experts are alike."
                )
            stack[expert] = part
        return (stack,)


@dataclass(frozen=True)
class TiedCopy:
    """A foreign weight that may be stored again although it is tied to ``of``."""

    foreign: str
    of: str


Template = TypeVar("Template", bound=Rename | Fuse)


def for_layers(count: int, templates: Sequence[Template]) -> list[Template]:
    """Each rule once for every layer, with ``{i}`` in its names replaced by the number."""
    return [_at_layer(template, i) for i in range(count) for template in templates]


def _at_layer(template: Template, index: int) -> Template:
    changes: dict[str, object] = {}
    for field in dataclasses.fields(template):
        value = getattr(template, field.name)
        if isinstance(value, str):
            changes[field.name] = value.format(i=index)
        elif field.name == "natives":
            changes[field.name] = tuple(name.format(i=index) for name in value)
    return dataclasses.replace(template, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class WeightTable:
    """All weights of one model, each exactly once on either side.

    copies: tied weights some writers store twice. ignored: foreign tensors without
    information, e.g. causal masks saved as buffers.
    """

    rules: tuple[Rule, ...]
    copies: tuple[TiedCopy, ...] = ()
    ignored: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for side in ("natives", "foreigns"):
            counts = Counter(name for rule in self.rules for name in getattr(rule, side))
            twice = [name for name, count in counts.items() if count > 1]
            if twice:
                raise ValueError(f"{side} {twice} appear in more than one rule")

    def as_foreign(self, native: Tensors) -> Tensors:
        """The foreign weights, made from native ones when read. Raises ConversionError."""
        makers = {name: (rule, k) for rule in self.rules for k, name in enumerate(rule.foreigns)}
        check_complete(native, (n for rule in self.rules for n in rule.natives), "native model")
        parts = _Held(native)

        def read(name: str) -> Tensor:
            rule, position = makers[name]
            if len(rule.foreigns) == 1:
                return rule.to_foreign(_Parts(native, rule.natives))[0]
            # Of its own, so that keeping one expert does not keep all of them.
            return rule.to_foreign(parts.of(rule.natives))[position].clone()

        return LazyTensors(makers, read)

    def as_native(self, foreign: Tensors, where: str = "weight files") -> Tensors:
        """The native weights, made from foreign ones when read. where: they come from.

        Raises ConversionError for weights left over or missing, and for a stored copy
        of a tied weight that differs from it.
        """
        makers = {name: (rule, k) for rule in self.rules for k, name in enumerate(rule.natives)}
        copies = {copy.foreign for copy in self.copies}
        names = [name for name in foreign if name not in copies | self.ignored]
        check_complete(names, (n for rule in self.rules for n in rule.foreigns), where)
        for copy in self.copies:
            if copy.foreign in foreign and not torch.equal(foreign[copy.foreign], foreign[copy.of]):
                raise ConversionError(
                    f"{copy.foreign} differs from {copy.of}, but config.json says they are tied. "
                    f"Set tie_word_embeddings to false there if the model has both."
                )

        def read(name: str) -> Tensor:
            rule, position = makers[name]
            return rule.to_native(_Parts(foreign, rule.foreigns))[position]

        return LazyTensors(makers, read)


class _Parts(Sequence[Tensor]):
    """Tensors by position, each read when asked for."""

    def __init__(self, tensors: Tensors, names: tuple[str, ...]) -> None:
        self._tensors, self._names = tensors, names

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: Any) -> Any:
        return self._tensors[self._names[index]]


class _Held:
    """The native weights of the rule asked for last: its foreign ones are read in turn, and to
    read a whole stack again for each of its experts would take them squared."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._names: tuple[str, ...] = ()
        self._parts: list[Tensor] = []

    def of(self, names: tuple[str, ...]) -> list[Tensor]:
        if names != self._names:
            self._parts.clear()
            self._parts = [self._tensors[name] for name in names]
            self._names = names
        return self._parts


def check_complete(found: Collection[str], wanted: Iterable[str], where: str) -> None:
    """No weight unread, none unwritten. Raises ConversionError naming them."""
    expected = set(wanted)
    missing, extra = sorted(expected - set(found)), sorted(set(found) - expected)
    if missing or extra:
        parts = [f"{len(missing)} missing: {_some(missing)}"] if missing else []
        parts += [f"{len(extra)} without a place: {_some(extra)}"] if extra else []
        raise ConversionError(f"The weights of the {where} do not fit: {'; '.join(parts)}.")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _check_size(tensor: Tensor, dim: int, size: int, name: str) -> None:
    if tensor.ndim == 0 or tensor.shape[dim] != size:
        raise ConversionError(
            f"{name} has shape {list(tensor.shape)}; config.json asks for {size} in "
            f"dimension {dim % max(tensor.ndim, 1)}."
        )
