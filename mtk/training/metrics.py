"""Metrics of a run: JSON lines on disk, TensorBoard on request."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from mtk.errors import ConfigError, Problem


class Writer(Protocol):
    """The part of TensorBoard's SummaryWriter that is used."""

    def add_scalar(self, tag: str, value: float, step: int) -> None: ...
    def close(self) -> None: ...


class Log(Protocol):
    """Where the loop's records go."""

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class NoLog:
    """For ranks other than the first."""

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        del event, step, values

    def close(self) -> None:
        return


class MetricsLog:
    """``metrics.jsonl``: one record a log line or evaluation.

    Opening it at a step drops the records after that step, so that a resumed run leaves
    the file as an uninterrupted one would (but for the timings).
    """

    def __init__(self, path: Path, step: int, tensorboard_dir: str | None) -> None:
        self.path = path
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(f"{json.dumps(r)}\n" for r in kept), encoding="utf-8")
        temporary.replace(path)
        self._stream = path.open("a", encoding="utf-8")
        self._board = _tensorboard(tensorboard_dir, step) if tensorboard_dir else None

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """Append a record; numbers also go to TensorBoard as ``event/name``.

        What is not finite (a norm that overflowed) becomes null: JSON has no such numbers.
        """
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        self._stream.write(json.dumps({"event": event, "step": step, **finite}) + "\n")
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
    """All records up to the first that is damaged: a kill can cut the last one off."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            break
        records.append(record)
    return records


def check_tensorboard(folder: str | None) -> None:
    """TensorBoard is installed and can write there. Raises ConfigError."""
    if folder is None:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        rule = f"cannot be written ({error.strerror})"
        raise ConfigError([Problem("logging.tensorboard_dir", folder, rule)]) from error
    _summary_writer(folder)


def _tensorboard(folder: str, step: int) -> Writer:
    writer: Writer = _summary_writer(folder)(folder, purge_step=step + 1)
    return writer


def _summary_writer(folder: str) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        rule = "TensorBoard is not installed"
        fix = "Install the extra: pip install 'mtk[track]', or leave the option out."
        raise ConfigError([Problem("logging.tensorboard_dir", folder, rule, fix)]) from error
    return SummaryWriter
