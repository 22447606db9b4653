"""From text to the ids that are scored, with or without BOS in front.

Megatron-LM puts nothing in front of a text; transformers, and lm-evaluation-harness with it,
puts BOS where the tokenizer's template says so. A model trained with it is lost without it.
"""

from __future__ import annotations

from typing import Literal

from mtk.errors import ConfigError, DataError, Problem
from mtk.tokenizers import Tokenizer

PrependBos = Literal["auto", "always", "never"]


class TextIds:
    """A tokenizer and the decision whether BOS stands in front of a text.

    prepend: ``auto`` is what transformers does with this tokenizer. Raises ConfigError for
    ``always`` with a tokenizer that has no BOS.
    """

    def __init__(self, tokenizer: Tokenizer, prepend: PrependBos = "auto") -> None:
        if prepend == "always" and tokenizer.bos is None:
            rule = "the model's tokenizer has no BOS token"
            raise ConfigError([Problem("prepend_bos", prepend, rule, "Nearest: auto.")])
        self.tokenizer = tokenizer
        wanted = prepend == "always" or (prepend == "auto" and tokenizer.bos_first)
        self.front: list[int] = [tokenizer.bos] if wanted and tokenizer.bos is not None else []

    def alone(self, text: str, origin: str = "") -> list[int]:
        """Ids of the text and nothing else. Raises DataError that names ``origin``."""
        try:
            return self.tokenizer.encode_alone(text)
        except DataError as error:
            raise DataError(f"{origin}: {error}" if origin else str(error)) from error

    def whole(self, text: str, origin: str = "") -> list[int]:
        """BOS, if it was decided for, and the text."""
        return self.front + self.alone(text, origin)

    @property
    def anchor(self) -> int:
        """What stands before the first token where that is predicted too: BOS, else the end of
        a document (as lm-evaluation-harness chooses)."""
        bos, eos = self.tokenizer.bos, self.tokenizer.eos
        if bos is not None:
            return bos
        return self.tokenizer.eod if eos is None else eos
