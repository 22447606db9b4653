"""A closed unpickler: foreign pickles become inert data, or are refused.

A pickle is a program that calls what it names. Here every name is looked up in
``allowed.py`` and nowhere else, and stands for a class or function of this file that only
keeps what it is given. Objects are made anew for each file and cannot be changed by the
pickle, so that one file cannot reach the next. What comes out is bounded, so that whoever
walks through it or prints it comes to an end.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Collection
from typing import IO, Any

import torch

from mtk.convert.megatron.allowed import (
    DICTS,
    DTYPES,
    ENUMS,
    INERT,
    MODULES,
    NAMESPACES,
    STORAGES,
)
from mtk.errors import ConversionError

# What damaged or hostile bytes make the interpreter of pickles raise.
FAULTS = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
# A list of references to a list of references ... is small in a file and endless to read.
# Each value counts as often as it is met.
MOST_VALUES, DEEPEST, LONGEST_INT = 5_000_000, 100, 4096


class Sealed:
    """An object that a pickle's BUILD cannot change."""

    __slots__ = ()

    def __setattr__(self, name: str, value: object) -> None:
        raise TypeError(f"{type(self).__name__}.{name} cannot be set by a pickle")

    def __setstate__(self, state: object) -> None:
        raise TypeError(f"{type(self).__name__} has no state")

    def _keep(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)


class StorageType(Sealed):
    """What ``torch.HalfStorage`` and the like stand for."""

    __slots__ = ("dtype",)
    dtype: torch.dtype

    def __init__(self, dtype: torch.dtype) -> None:
        self._keep(dtype=dtype)


class StorageRef(Sealed):
    """A run of numbers in the same file, by its key."""

    __slots__ = ("dtype", "key", "numel")
    key: str
    dtype: torch.dtype
    numel: int

    def __init__(self, key: str, dtype: torch.dtype, numel: int) -> None:
        self._keep(key=key, dtype=dtype, numel=numel)


class StoredTensor(Sealed):
    """A tensor not read yet: a strided view of a storage. Raises ValueError out of its bounds."""

    __slots__ = ("offset", "shape", "storage", "stride")
    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __init__(self, storage: object, offset: object, shape: object, stride: object) -> None:
        if not isinstance(storage, StorageRef):
            raise TypeError("a tensor without a storage")
        sizes, steps = _counts(shape), _counts(stride)
        start = _counts((offset,))[0]
        if len(sizes) != len(steps):
            raise ValueError(f"a tensor of shape {sizes} with strides {steps}")
        last = start + sum((n - 1) * s for n, s in zip(sizes, steps, strict=True))
        if 0 not in sizes and last >= storage.numel:
            raise ValueError(f"a tensor of shape {sizes} in a storage of {storage.numel}")
        self._keep(storage=storage, offset=start, shape=sizes, stride=steps)

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype


def _counts(values: object) -> tuple[int, ...]:
    if not isinstance(values, tuple | list):
        raise TypeError("sizes that are no tuple")
    for value in values:
        if type(value) is not int or value < 0:
            raise TypeError(f"a size of {_short(value)}")
    return tuple(values)


class Call(Sealed):
    """A function a pickle may call."""

    __slots__ = ("function",)
    function: Callable[..., object]

    def __init__(self, function: Callable[..., object]) -> None:
        self._keep(function=function)

    def __call__(self, *args: object) -> object:
        return self.function(*args)


class _SealedClass(type):
    def __setattr__(cls, name: str, value: object) -> None:
        raise TypeError(f"{cls.__name__}.{name} cannot be set by a pickle")


class InertObject:
    """A foreign object: its class by name, and whatever the pickle said about it."""

    foreign = ""

    def __new__(cls, *args: object, **kwargs: object) -> InertObject:
        made = object.__new__(cls)
        made.args = (*args, *kwargs.values())
        made.state = None
        return made

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.args: tuple[object, ...]
        self.state: object

    def __setstate__(self, state: object) -> None:
        self.state = state

    def append(self, item: object) -> None:
        """Part of lists and queues; dropped, as nobody reads them."""

    def extend(self, items: object) -> None:
        """As :meth:`append`."""

    def __setitem__(self, key: object, value: object) -> None:
        """Part of dicts; dropped."""

    def __repr__(self) -> str:
        return f"<{self.foreign}{self.args!r:.60}>"


class InertDict(dict[Any, Any]):
    """An ``OrderedDict`` or ``defaultdict`` (without its factory)."""

    def __init__(self, *args: object) -> None:
        pairs = [arg for arg in args if isinstance(arg, list | tuple)]
        super().__init__(*pairs)

    def __setstate__(self, state: object) -> None:
        """``state_dict()`` hangs versions of modules on itself; they say nothing here."""


class Arguments:
    """An ``argparse.Namespace`` as a plain dict, ``values``."""

    def __new__(cls, **values: object) -> Arguments:
        made = object.__new__(cls)
        made.values = dict(values)
        return made

    def __init__(self, **values: object) -> None:
        self.values: dict[str, object]

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict) or any(not isinstance(name, str) for name in state):
            raise TypeError("a namespace whose state is no dict of names")
        self.values = dict(state)


class ClosedUnpickler(pickle._Unpickler):
    """Raises ConversionError, naming the file and the global, for anything not allowed.

    The one in Python, as that in C makes room for as many objects as the pickle says it has.
    """

    def __init__(self, stream: IO[bytes], where: str) -> None:
        super().__init__(stream, encoding="latin-1")
        self._where = where
        self._made: dict[str, Any] = {}
        self.storages: dict[str, StorageRef] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{MODULES.get(module, module)}.{name}"
        if full not in self._made:
            found = None if "." in name else self._allowed(full)
            if found is None:
                raise ConversionError(
                    f"{self._where}: the pickle asks for {full!r:.120}, which is not on the list "
                    f"of what a Megatron checkpoint may hold. Nothing of it was run or read."
                )
            self._made[full] = found
        return self._made[full]

    def _allowed(self, full: str) -> Any:
        if full in STORAGES:
            return StorageType(STORAGES[full])
        if full in DTYPES:
            return DTYPES[full]
        if full in DICTS:
            return _fresh("InertDict", InertDict, full)
        if full in NAMESPACES:
            return _fresh("Arguments", Arguments, full)
        if full in INERT:
            return _fresh("Inert", InertObject, full)
        calls: dict[str, Callable[..., object]] = {
            "torch._utils._rebuild_tensor": StoredTensor,
            "torch._utils._rebuild_tensor_v2": _tensor_v2,
            "torch._utils._rebuild_parameter": _first,
            "torch._utils._rebuild_parameter_with_state": _first,
            "torch._tensor._rebuild_from_type_v2": _from_type,
            "builtins.getattr": _enum_member,
        }
        return Call(calls[full]) if full in calls else None

    def persistent_load(self, pid: Any) -> StorageRef:
        """A storage: ("storage", type, key, device, count), before torch 1.6 with a view."""
        if not isinstance(pid, tuple) or not 5 <= len(pid) <= 6 or pid[0] != "storage":
            raise ConversionError(f"{self._where}: {_short(pid)} is no storage of torch.")
        _, kind, key, _, numel, *view = pid
        good = isinstance(kind, StorageType) and isinstance(key, str)
        if not good or type(numel) is not int or numel < 0 or view not in ([], [None]):
            raise ConversionError(f"{self._where}: storage {_short(key)} is not understood.")
        if key not in self.storages:
            self.storages[key] = StorageRef(key, kind.dtype, numel)
        found = self.storages[key]
        if (found.dtype, found.numel) != (kind.dtype, numel):
            raise ConversionError(f"{self._where}: storage {key!r:.40} is described twice.")
        return found


def unpickle(stream: IO[bytes], where: str) -> tuple[Any, dict[str, StorageRef]]:
    """One pickle from ``stream``, and the storages it names. Raises ConversionError."""
    reader = ClosedUnpickler(stream, where)
    try:
        content = reader.load()
        _check_bounds(content)
        return content, reader.storages
    except FAULTS as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConversionError(f"{where}: the pickle is damaged or hostile ({reason:.200}).") from (
            error
        )


def _check_bounds(content: object) -> None:
    """Raises ValueError for a content without end, or as good as that."""
    stack, met = [(content, 0)], 0
    while stack:
        value, depth = stack.pop()
        met += 1
        if met > MOST_VALUES or depth > DEEPEST:
            raise ValueError("values within values without end")
        if isinstance(value, int) and value.bit_length() > LONGEST_INT:
            raise ValueError(f"a number of {value.bit_length()} bits")
        stack += [(part, depth + 1) for part in _parts(value)]


def _parts(value: object) -> Collection[object]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return value
    if isinstance(value, Arguments):
        return list(value.values.values())
    return (value.args, value.state) if isinstance(value, InertObject) else ()


def _short(value: object) -> str:
    """For a message: other values may have no end."""
    plain = isinstance(value, str | bytes | float | bool | None)
    return f"{value!r:.60}" if plain or type(value) is int else f"a {type(value).__name__}"


def _fresh(name: str, base: type, full: str) -> type:
    return _SealedClass(name, (base,), {"foreign": full})


def _tensor_v2(
    storage: object, offset: object, shape: object, stride: object, *rest: object
) -> StoredTensor:
    del rest  # requires_grad, hooks, metadata
    return StoredTensor(storage, offset, shape, stride)


def _first(data: object, *rest: object) -> object:
    del rest
    if not isinstance(data, StoredTensor):
        raise TypeError("a parameter that is no tensor")
    return data


def _from_type(function: object, kind: object, args: object, state: object) -> object:
    del kind, state
    if not isinstance(function, Call) or not isinstance(args, tuple):
        raise TypeError("a tensor made in an unknown way")
    return _first(function(*args))


def _enum_member(owner: object, member: object) -> InertObject:
    known = isinstance(owner, type) and getattr(owner, "foreign", None) in ENUMS
    if not known or not isinstance(member, str) or not member.isidentifier() or member[0] == "_":
        raise TypeError(f"getattr of {_short(member)} of something that is no enum of Megatron")
    made: InertObject = owner(member)  # type: ignore[operator]
    return made
