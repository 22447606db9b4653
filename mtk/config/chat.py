"""Options of conversations (``mtk finetune --task sft``)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mtk.config.schema import option
from mtk.errors import Problem


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """How conversations become samples."""

    chat_template: str | None = option(
        None,
        help="chatml, llama3, plain, or a file with a Jinja template (default: what the "
        "checkpoint's tokenizer brings).",
    )
    packing: bool = option(
        True, help="Fill samples with several conversations, kept apart; else one, padded."
    )
    on_bad_line: Literal["fail", "skip"] = option(
        "fail", help="What to do with a line that is no conversation."
    )

    def problems(self) -> Iterator[Problem]:
        if self.chat_template == "":
            yield Problem("chat_template", "", "is empty", "Use chatml, llama3, plain or a file.")
