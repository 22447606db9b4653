"""Metrics of a run: JSON lines on disk, TensorBoard on request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from mtk.errors import ConfigError, Problem


class Writer(Protocol):
    """The part of TensorBoard's SummaryWriter that is used."""

    def add_scalar(self, tag: str, value: float, step: int) -> None: ...
    def close(self) -> None: ...


class MetricsLog:
    """``metrics.jsonl``: one record a log line or evaluation.

    Opening it at a step drops the records after that step, so that a resumed run leaves
    the file as an uninterrupted one would (but for the timings).
    """

    def __init__(self, path: Path, step: int, tensorboard_dir: str | None) -> None:
        self.path = path
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        temporary.replace(path)
        self._stream = path.open("a", encoding="utf-8")
        self._board = _tensorboard(tensorboard_dir, step) if tensorboard_dir else None

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """Append a record; numbers also go to TensorBoard as ``event/name``."""
        self._stream.write(json.dumps({"event": event, "step": step, **values}) + "\n")
        self._stream.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"{event}/{name}", value, step)

    def close(self) -> None:
        self._stream.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records; a last line that was cut off by a kill is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _tensorboard(folder: str, step: int) -> Writer:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        rule = "TensorBoard is not installed"
        fix = "Install the extra: pip install 'mtk[track]', or leave the option out."
        raise ConfigError([Problem("logging.tensorboard_dir", folder, rule, fix)]) from error
    writer: Writer = SummaryWriter(folder, purge_step=step + 1)
    return writer
