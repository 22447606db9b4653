"""Fields of configuration dataclasses and the walk over their leaves."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any


@dataclass(frozen=True)
class OptionSpec:
    """What an option needs besides its type and default.

    aliases: further command-line spellings. runtime: the value cannot change the
    result (worker counts, log intervals), so it stays out of the config digest.
    required: must be given by some layer. shortcuts: flags without a value that set
    this option to a fixed value, e.g. ``--swiglu`` for ``activation = swiglu``.
    hidden: no flag of its own; another option or a stage sets it.
    """

    help: str
    aliases: tuple[str, ...] = ()
    shortcuts: tuple[tuple[str, Any], ...] = ()
    runtime: bool = False
    required: bool = False
    hidden: bool = False


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    aliases: tuple[str, ...] = (),
    shortcuts: tuple[tuple[str, Any], ...] = (),
    runtime: bool = False,
    hidden: bool = False,
) -> Any:
    """A configuration value; without a default the user must give it."""
    required = default is dataclasses.MISSING
    spec = OptionSpec(help, aliases, shortcuts, runtime, required, hidden)
    return dataclasses.field(
        default=None if required else default, kw_only=True, metadata={"option": spec}
    )


def group(factory: Callable[[], Any], *, title: str, hidden: bool = False) -> Any:
    """A nested group of options; ``title`` heads its panel in ``--help``. hidden: see
    :class:`OptionSpec`."""
    metadata = {"group": title, "hidden": hidden}
    return dataclasses.field(default=factory(), kw_only=True, metadata=metadata)


@dataclass(frozen=True)
class Leaf:
    """One option as seen from the root configuration.

    path: attribute names from the root, e.g. ``("model", "num_layers")``. hidden: it has no
    flag, because of its own or its group's.
    """

    path: tuple[str, ...]
    annotation: Any
    default: Any
    spec: OptionSpec
    panel: str
    hidden: bool = False

    @property
    def name(self) -> str:
        return self.path[-1]

    @property
    def key(self) -> str:
        return ".".join(self.path)


@lru_cache(maxsize=256)
def hints(config_class: type) -> dict[str, Any]:
    """Resolved annotations of a configuration dataclass."""
    return typing.get_type_hints(config_class)


def leaves(config_class: type) -> Iterator[Leaf]:
    """All options below ``config_class`` in declaration order."""
    yield from _leaves(config_class, (), "Options", hidden=False)


def _leaves(
    config_class: type, prefix: tuple[str, ...], panel: str, *, hidden: bool
) -> Iterator[Leaf]:
    annotations = hints(config_class)
    for field in dataclasses.fields(config_class):
        path = (*prefix, field.name)
        annotation = annotations[field.name]
        if "group" in field.metadata:
            inside = hidden or field.metadata["hidden"]
            yield from _leaves(annotation, path, field.metadata["group"], hidden=inside)
        else:
            spec = field.metadata.get("option")
            if spec is None:
                raise TypeError(f"{config_class.__name__}.{field.name} was not made with option()")
            yield Leaf(path, annotation, field.default, spec, panel, hidden or spec.hidden)
