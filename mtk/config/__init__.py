"""Typed, frozen configuration: one source of names, help and defaults.

A stage's options are a frozen dataclass whose fields are made with :func:`option`
(a value) or :func:`group` (a nested dataclass). :func:`resolve` merges the layers
recipe < YAML file < command line < ``--set`` once, checks all rules together and
fills in derived values. Nothing changes a configuration afterwards.
"""

from mtk.config.digest import config_digest, to_dict
from mtk.config.resolve import Layer, Resolved, make, resolve
from mtk.config.schema import Leaf, OptionSpec, group, leaves, option

__all__ = [
    "Layer",
    "Leaf",
    "OptionSpec",
    "Resolved",
    "config_digest",
    "group",
    "leaves",
    "make",
    "option",
    "resolve",
    "to_dict",
]
