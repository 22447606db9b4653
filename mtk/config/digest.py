"""A configuration as plain data and its digest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from mtk.config.schema import leaves


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain data (tuples become lists), ready for YAML or JSON."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            out[field.name] = to_dict(value)
        else:
            out[field.name] = list(value) if isinstance(value, tuple) else value
    return out


def config_digest(config: Any) -> str:
    """SHA-256 over all options that can change the result (``runtime`` ones are left out)."""
    content = {}
    for leaf in leaves(type(config)):
        if not leaf.spec.runtime:
            value = config
            for name in leaf.path:
                value = getattr(value, name)
            content[leaf.key] = list(value) if isinstance(value, tuple) else value
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
