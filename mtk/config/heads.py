"""Tasks that BERT is finetuned for with a head of its own: RACE, MNLI, QQP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Tokens of question and answer together that RACE keeps.
MAX_QA_LENGTH = 128


@dataclass(frozen=True)
class ClassificationTask:
    """choices: sequences of a sample. outputs: values of the head for each sequence. classes:
    different labels. labels: their names by number, none where a label is the number of a
    choice. first_limit: tokens kept of A, None for all that fit."""

    name: str
    choices: int
    outputs: int
    labels: tuple[str, ...] = ()
    first_limit: int | None = None

    @property
    def classes(self) -> int:
        return max(self.choices, self.outputs)


TASKS: Mapping[str, ClassificationTask] = {
    "RACE": ClassificationTask("RACE", choices=4, outputs=1, first_limit=MAX_QA_LENGTH),
    "MNLI": ClassificationTask("MNLI", 1, 3, labels=("contradiction", "entailment", "neutral")),
    "QQP": ClassificationTask("QQP", 1, 2, labels=("not_duplicate", "duplicate")),
}
