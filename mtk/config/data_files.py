"""Blends in files: options that name them, and what they hold.

A blend of thousands of datasets does not fit a command line. The files are those of Megatron-LM;
what they hold takes the place of the options when a configuration is resolved, so that a saved
configuration does not depend on them.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtk.config.schema import option
from mtk.errors import ConfigError, Problem

SPLITS = ("train", "valid", "test")
Items = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DataFileOptions:
    """Part of :class:`mtk.config.pretrain.DataConfig`. What the files hold counts, not their
    names."""

    data_args_path: str | None = option(
        None,
        help="File with the words of --data-path, e.g. thousands of weights and prefixes.",
        runtime=True,
    )
    per_split_data_args_path: str | None = option(
        None,
        help='JSON file {"train": [...], "valid": [...], "test": [...]} with the words of '
        "--train-data-path and so on.",
        runtime=True,
    )


def read_data_args(path: str) -> Items:
    """The words of a file, separated by white space; quotes keep them together.

    Raises ConfigError for a file that cannot be read, or holds none.
    """
    return _words(_text("data.data_args_path", path), "data.data_args_path", path)


def read_per_split_data_args(path: str) -> dict[str, Items]:
    """The words for each split, by "train", "valid", "test"; () where the file has none.

    Raises ConfigError for a file that cannot be read, has other keys, or no "train".
    """
    key = "data.per_split_data_args_path"
    try:
        content = json.loads(_text(key, path))
    except ValueError as error:
        raise ConfigError([Problem(key, path, f"is not JSON: {error}")]) from error
    if not isinstance(content, dict) or not content.get("train") or set(content) - set(SPLITS):
        found = ", ".join(content) if isinstance(content, dict) else type(content).__name__
        rule = f'must hold an object with "train" and, if wanted, "valid" and "test"; has {found}'
        raise ConfigError([Problem(key, path, rule)])
    return {split: _split_words(content.get(split) or [], split, path) for split in SPLITS}


def _split_words(value: Any, split: str, path: str) -> Items:
    key = "data.per_split_data_args_path"
    if isinstance(value, str):
        return _words(value, key, path)
    if not isinstance(value, list) or not all(isinstance(v, str | int | float) for v in value):
        rule = f'"{split}" must be a list of weights and prefixes, or a text of them'
        raise ConfigError([Problem(key, path, rule)])
    return tuple(str(item) for item in value)


def _words(text: str, key: str, path: str) -> Items:
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise ConfigError([Problem(key, path, f"has words that do not end: {error}")]) from error
    if not words:
        raise ConfigError([Problem(key, path, "names no dataset")])
    return words


def _text(key: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError([Problem(key, path, f"is not UTF-8 text: {error}")]) from error
    except OSError as error:
        raise ConfigError([Problem(key, path, f"cannot be read ({error.strerror})")]) from error
