"""Configuration layers from YAML files, manifests, and ``--set a.b=c``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtk.config.resolve import Layer
from mtk.errors import ConfigError, Problem


def read_layer(path: str | Path) -> Layer:
    """A layer from a YAML file, or from an ``artifact.json`` (its resolved config)."""
    import yaml

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError([Problem("config", str(path), f"is not UTF-8 text: {error}")]) from error
    except OSError as error:
        problem = Problem("config", str(path), f"cannot be read ({error.strerror})")
        raise ConfigError([problem]) from error
    try:
        content = json.loads(text) if path.suffix == ".json" else _parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        where = " ".join(str(error).split())
        raise ConfigError([Problem("config", str(path), f"does not parse: {where}")]) from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        rule = f"must hold a mapping of options, not a {type(content).__name__}"
        raise ConfigError([Problem("config", str(path), rule)])
    if "config_digest" in content and isinstance(content.get("config"), dict):
        content = content["config"]
    return Layer(str(path), content)


def _parse_yaml(text: str) -> Any:
    """As yaml.safe_load, but a key that is written twice is an error, not the last one wins."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            # Taken before the parent resolves "<<", whose keys may be overridden.
            names = [key.value for key, _ in node.value]
            mapping = super().construct_mapping(node, deep)
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{twice!r} is given twice", node.start_mark
                )
            return mapping

    return yaml.load(text, Loader)


def set_layer(assignments: Sequence[str]) -> Layer:
    """A layer from ``key=value`` texts; values are read as YAML (lists, numbers, text)."""
    import yaml

    values: dict[str, Any] = {}
    problems = []
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            fix = "Write it as --set group.option=value."
            problems.append(Problem("set", assignment, "is not an assignment", fix))
            continue
        try:
            values[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError:
            values[key.strip()] = text
    if problems:
        raise ConfigError(problems)
    return Layer("--set", values)


def write_config(config: dict[str, Any], path: Path) -> None:
    """Save a resolved configuration so that ``--config path`` repeats the run."""
    import yaml

    path.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
