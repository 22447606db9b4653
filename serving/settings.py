"""What a server lets its clients do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Limits and identity of a server.

    model: the name that clients see. lineage: the chain of the served artifact as plain
    data, None for a model that mtk did not make. api_keys: empty lets everybody in.
    max_concurrency: generation requests answered at once. max_sequences: prompts x n of a
    request. request_timeout: seconds until a request is given up (504). probe_timeout:
    seconds an engine may take to decode the token of a health check. log: gets one line a
    request and the details of internal errors.
    """

    model: str
    lineage: dict[str, Any] | None = None
    api_keys: frozenset[str] = frozenset()
    max_concurrency: int = 64
    max_body_bytes: int = 2_000_000
    max_sequences: int = 128
    max_stop_strings: int = 16
    max_stop_length: int = 256
    max_beam_width: int = 32
    request_timeout: float = 600.0
    probe_timeout: float = 5.0
    log: Callable[[str], None] = field(default=lambda line: None)
