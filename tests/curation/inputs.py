"""Small files for the steps, and what they left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mtk.log import Reporter
from mtk.session import Session

QUIET = Session(Reporter(quiet=True))


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]
