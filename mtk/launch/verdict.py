"""What ended a job, as one error: the first cause first, what followed from it briefly."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mtk.errors import Interrupted, MtkError, WorkerError
from mtk.launch.failures import Failure, describe_status

# Exit status of a rank that ended outside its job's function.
NO_ANSWER = 70


@dataclass
class Record:
    """What is known of one rank at the end. status: as of ``os.waitpid``, None while it lives.
    ended_by_us: the launcher told it to end, whatever it says afterwards is no cause."""

    rank: int
    failure: Failure | None = None
    status: int | None = None
    returned: bool = False
    timed_out: bool = False
    ended_by_us: bool = False
    lines: Sequence[str] = field(default_factory=list)

    @property
    def died(self) -> bool:
        return self.status is not None and self.failure is None and not self.returned

    @property
    def peer_only(self) -> bool:
        """It failed, but only since another rank went away or did not come."""
        return self.timed_out or (self.failure is not None and self.failure.kind == "peer")

    @property
    def interrupted(self) -> bool:
        """It stopped on request."""
        return self.failure is not None and self.failure.kind == "interrupted"

    @property
    def cause(self) -> bool:
        """It failed by itself."""
        return not self.peer_only and (self.died or self.failure is not None)


def verdict(
    order: Sequence[Record],
    records: Mapping[int, Record],
    *,
    stop: signal.Signals | None = None,
    hang: str = "",
) -> MtkError:
    """The error to raise. order: records that failed, first to last; stop: the signal that was
    forwarded to all ranks; hang: who is missing, as ``hang.explain`` tells."""
    interrupted = [record for record in order if record.interrupted]
    if stop is not None:
        # Ranks that stop leave others behind in collectives: not their failure.
        for record in sorted(interrupted, key=lambda r: r.rank):
            return _carried(record, records)
        if any(_ended_by(record, stop) for record in order):
            return Interrupted(f"stopped by {stop.name}. Repeat the command.")
    causes = [record for record in order if record.cause]
    if causes:
        first = causes[0]
        if first.failure is not None and first.failure.kind != "error":
            return _carried(first, records)
        return WorkerError(_failed(first, records) if first.failure else _died(first, records))
    return WorkerError(_hung(order, records, hang))


def _ended_by(record: Record, stop: signal.Signals) -> bool:
    """The signal met it outside its function: killed by it before it had handlers, ended
    without a job, or (NO_ANSWER) with its answer not yet on the way."""
    if not record.died or record.status is None:
        return False
    return record.status & 0x7F == stop or record.status in (0, NO_ANSWER << 8)


def _carried(record: Record, records: Mapping[int, Record]) -> MtkError:
    """The rank's own MtkError; its traceback is kept as the cause, for developers."""
    assert record.failure is not None
    error = record.failure.error() or WorkerError(record.failure.text)
    error.__cause__ = WorkerError(_failed(record, records))
    return error


def _failed(record: Record, records: Mapping[int, Record]) -> str:
    assert record.failure is not None
    trace = label(record.rank, record.failure.traceback.splitlines())
    return f"rank {record.rank} failed:\n{trace}{_rest(record.rank, records)}{_output(record)}"


def _died(record: Record, records: Mapping[int, Record]) -> str:
    assert record.status is not None
    how = describe_status(record.status)
    return f"rank {record.rank} {how}.{_output(record)}{_rest(record.rank, records)}"


def _hung(order: Sequence[Record], records: Mapping[int, Record], hang: str) -> str:
    text = hang or "ranks lost their peers, and none says why"
    says = [f"rank {r.rank}: {r.failure.text}" for r in order if r.failure is not None]
    backend = f"\nThe backend says on {says[0]}" if says else ""
    shown = "".join(_output(record) for record in records.values())
    return f"{text}.{backend}{shown}"


def _output(record: Record) -> str:
    """The end of what a rank wrote, which nobody has seen yet."""
    lines = [line for line in record.lines if line.strip()]
    if not lines:
        return ""
    return f"\nLast lines of rank {record.rank}:\n{label(record.rank, lines[-20:])}"


def _rest(rank: int, records: Mapping[int, Record]) -> str:
    """One line on every other rank that did not simply finish."""
    others = [record for record in records.values() if record.rank != rank]
    kinds = {
        "lost their peer": [r.rank for r in others if r.peer_only],
        "failed too": [r.rank for r in others if r.cause and not r.ended_by_us],
        "were ended": [r.rank for r in others if r.ended_by_us and not r.peer_only],
    }
    shown = [f"{_ranks(ranks)} {what}" for what, ranks in kinds.items() if ranks]
    return f"\nOf the other ranks: {'; '.join(shown)}." if shown else ""


def label(rank: int, lines: Iterable[str]) -> str:
    return "\n".join(f"[rank {rank}] {line}" for line in lines)


def _ranks(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
