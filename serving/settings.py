"""What a server lets its clients do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.chat_prompt import ChatPrompt

# What no option raises: the largest number that any engine counts tokens with.
MOST_TOKENS = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Limits and identity of a server.

    model: the name that clients see. lineage: the chain of the served artifact as plain
    data, None for a model that mtk did not make. api_keys: empty lets everybody in. chat: how
    messages become a prompt, None for a model without a chat template.
    max_concurrency: generation requests answered at once. max_prompts: of a request;
    max_sequences: its prompts x n. max_prompt_tokens, max_new_tokens: of a sequence, None for
    what the context holds. max_stop_length: characters. max_schema_bytes: of the JSON schema
    of ``response_format``. request_timeout: seconds until a request is given up (504).
    read_timeout: seconds that a request may take to arrive. write_timeout: seconds that a client
    may leave its answer unread. probe_timeout: seconds an engine may take to decode the token of
    a health check. log: gets one line a request and the details of internal errors.
    """

    model: str
    lineage: dict[str, Any] | None = None
    api_keys: frozenset[str] = frozenset()
    chat: ChatPrompt | None = None
    max_concurrency: int = 64
    max_body_bytes: int = 2_000_000
    max_prompts: int = 128
    max_sequences: int = 128
    max_prompt_tokens: int | None = None
    max_new_tokens: int | None = None
    max_stop_strings: int = 16
    max_stop_length: int = 256
    max_top_logprobs: int = 20
    max_logit_bias: int = 300
    max_schema_bytes: int = 65_536
    max_beam_width: int = 32
    request_timeout: float = 600.0
    read_timeout: float = 60.0
    write_timeout: float = 60.0
    probe_timeout: float = 2.5
    log: Callable[[str], None] = field(default=lambda line: None)

    @property
    def most_new_tokens(self) -> int:
        return MOST_TOKENS if self.max_new_tokens is None else self.max_new_tokens
