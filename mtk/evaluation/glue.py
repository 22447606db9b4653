"""MNLI (Williams et al. 2018) and QQP from GLUE's published TSV files (Wang et al. 2018).

The header tells a test file, whose labels are not published, by its number of columns; its
samples get label 0. Fields are never quoted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from mtk.config.heads import TASKS
from mtk.errors import DataError
from mtk.evaluation.classification import LabelledText, clean_text
from mtk.evaluation.documents import read_text

MNLI_LABELS = {label: number for number, label in enumerate(TASKS["MNLI"].labels)}
MNLI_FIRST, MNLI_SECOND, MNLI_TEST_COLUMNS = 8, 9, 10
QQP_COLUMNS, QQP_TEST_COLUMNS = 6, 3

Warn = Callable[[str], None]


def read_mnli(path: str | Path) -> list[LabelledText]:
    """Columns: 0 uid, 8 and 9 the sentences, the last the label; ten columns are a test file.

    Raises DataError naming the line of an empty sentence, a wrong label or a short row.
    """
    path = Path(path)
    header, rows = _rows(path)
    test = len(header) == MNLI_TEST_COLUMNS
    if len(header) < MNLI_TEST_COLUMNS:
        raise DataError(f"{path}:1 has {len(header)} columns, MNLI's files at least 10.")
    out = []
    for row, origin in rows:
        if len(row) <= MNLI_SECOND + (not test):
            wanted = "a sentence" if test else "a label"
            raise DataError(f"{origin} has {len(row)} columns, too few to hold {wanted}.")
        first, second = clean_text(row[MNLI_FIRST].strip()), clean_text(row[MNLI_SECOND].strip())
        if not first or not second:
            raise DataError(f"{origin}: sentence {1 if not first else 2} is empty.")
        label = "contradiction" if test else row[-1].strip()
        if label not in MNLI_LABELS:
            raise DataError(
                f"{origin}: the label is {label!r}, not one of {', '.join(MNLI_LABELS)}."
            )
        uid = _number(row[0], origin, "uid")
        out.append(LabelledText(uid, MNLI_LABELS[label], ((first, second),), origin))
    return _filled(out, path)


def read_qqp(path: str | Path, warn: Warn) -> list[LabelledText]:
    """Columns: 0 id, 3 and 4 the questions, 5 the label; of a test file 0 id, 1 and 2.

    Rows of train and dev files with another width or an empty question are left out, which
    ``warn`` is told once, with the first of them. Raises DataError for other faults.
    """
    path = Path(path)
    header, rows = _rows(path)
    if len(header) not in (QQP_COLUMNS, QQP_TEST_COLUMNS):
        raise DataError(
            f"{path}:1 has {len(header)} columns; QQP's files have {QQP_COLUMNS}, its test file "
            f"{QQP_TEST_COLUMNS}."
        )
    test = len(header) == QQP_TEST_COLUMNS
    out, left_out = [], []
    for row, origin in rows:
        fault = _qqp_fault(row, test)
        if fault and test:
            raise DataError(f"{origin}: {fault}.")
        if fault:
            left_out.append(f"{origin}: {fault}")
            continue
        first, second = (clean_text(text.strip()) for text in _qqp_questions(row, test))
        label = 0 if test else _number(row[5], origin, "label")
        if label not in (0, 1):
            raise DataError(f"{origin}: the label is {label}, not 0 or 1.")
        out.append(LabelledText(_number(row[0], origin, "id"), label, ((first, second),), origin))
    if left_out:
        warn(f"{len(left_out)} rows of {path} were left out, the first: {left_out[0]}")
    return _filled(out, path)


def glue_name(path: str | Path, task: str) -> str:
    """``.../MNLI/dev_matched.tsv`` -> ``dev-matched``."""
    name = str(path).replace("\\", "/").split(task)[-1].removesuffix(".tsv")
    return name.strip("/").replace("_", "-")


def _qqp_questions(row: list[str], test: bool) -> tuple[str, str]:
    return (row[1], row[2]) if test else (row[3], row[4])


def _qqp_fault(row: list[str], test: bool) -> str:
    width = QQP_TEST_COLUMNS if test else QQP_COLUMNS
    if len(row) != width:
        return f"{len(row)} columns instead of {width}"
    return "" if all(text.strip() for text in _qqp_questions(row, test)) else "an empty question"


def _rows(path: Path) -> tuple[list[str], Iterator[tuple[list[str], str]]]:
    """The header's columns, and (columns, ``file:line``) of the other lines that are not blank."""
    # White space around a line is no column, as in Megatron-LM.
    lines = [line.strip().split("\t") for line in read_text(path).split("\n")]
    rows = ((row, f"{path}:{n}") for n, row in enumerate(lines[1:], start=2) if row != [""])
    return lines[0], rows


def _number(text: str, origin: str, what: str) -> int:
    # 18 digits always fit the 64 bits that a batch holds it in.
    if not text.strip().isdecimal() or len(text.strip()) > 18:
        raise DataError(
            f"{origin}: the {what} is {text.strip()[:40]!r}, not a whole number of up to 18 digits."
        )
    return int(text)


def _filled(found: list[LabelledText], path: Path) -> list[LabelledText]:
    if not found:
        raise DataError(f"{path} holds no sample besides its header.")
    return found
