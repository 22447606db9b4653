"""RACE (Lai et al. 2017): reading comprehension, four choices a question.

A folder of ``*.txt`` files; each line is a JSON object with article (text), questions (texts),
options (four texts a question) and answers (``A`` to ``D``).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtk.config.heads import TASKS
from mtk.errors import DataError
from mtk.evaluation.classification import LabelledText, clean_text
from mtk.evaluation.documents import parse_object, read_text

CHOICES = TASKS["RACE"].choices
LETTERS = "ABCD"


def read_race(folder: str | Path) -> list[LabelledText]:
    """Every question of every file, files by name; uid is a running number.

    A of a sequence is the question with the option in the place of every ``_``, or behind the
    question; B is the article. Raises DataError naming file and line.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder. RACE's data are folders of *.txt files.")
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise DataError(f"{folder} holds no *.txt file. RACE's are in e.g. RACE/dev/middle.")
    out: list[LabelledText] = []
    for path in files:
        for pairs, label, origin in _questions(path):
            out.append(LabelledText(len(out), label, pairs, origin))
    return out


def race_name(folder: str | Path) -> str:
    """``.../RACE/dev/middle`` -> ``dev-middle``."""
    return str(folder).replace("\\", "/").split("RACE")[-1].strip("/").replace("/", "-")


def _questions(path: Path) -> Iterator[tuple[tuple[tuple[str, str], ...], int, str]]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        origin = f"{path}:{number}"
        article, questions, options, answers = _fields(line, origin)
        article = clean_text(article)
        if not len(questions) == len(options) == len(answers):
            raise DataError(
                f"{origin} has {len(questions)} questions, {len(options)} lists of options and "
                f"{len(answers)} answers; there must be one of each."
            )
        for index, (question, choices, answer) in enumerate(
            zip(questions, options, answers, strict=True), start=1
        ):
            where = f"{origin}, question {index}"
            yield _pairs(question, choices, article, where), _label(answer, where), where


def _fields(line: str, origin: str) -> tuple[str, list[Any], list[Any], list[Any]]:
    record = parse_object(line, origin)
    article = record.get("article")
    if not isinstance(article, str) or not article.strip():
        raise DataError(f"{origin}: the field 'article' is missing, empty, or not a text.")
    lists = []
    for name in ("questions", "options", "answers"):
        if not isinstance(record.get(name), list):
            raise DataError(f"{origin}: the field {name!r} is missing, or not a list.")
        lists.append(record[name])
    return article, lists[0], lists[1], lists[2]


def _pairs(question: Any, options: Any, article: str, where: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(question, str):
        raise DataError(f"{where} is not a text.")
    texts = isinstance(options, list) and all(isinstance(option, str) for option in options)
    if not texts or len(options) != CHOICES:
        raise DataError(f"{where}: the options are not {CHOICES} texts: {str(options)[:80]}.")
    return tuple((clean_text(_joined(question, option)), article) for option in options)


def _joined(question: str, option: str) -> str:
    return question.replace("_", option) if "_" in question else f"{question} {option}"


def _label(answer: Any, where: str) -> int:
    if not isinstance(answer, str) or len(answer) != 1 or answer not in LETTERS:
        raise DataError(f"{where}: the answer is {answer!r}, not one of {', '.join(LETTERS)}.")
    return LETTERS.index(answer)
