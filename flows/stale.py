"""Runs that were killed: nobody could record their end, so the next run does.

A flow run carries a tag that names its process. When that process no longer exists, a
recorded state of Running is not the truth, and becomes Crashed.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState
from prefect.client.schemas.filters import FlowRunFilterStateType as StateTypeFilter
from prefect.client.schemas.objects import StateType
from prefect.runtime import flow_run
from prefect.states import Crashed

from mtk.artifacts.staging import process_exists

PREFIX = "process:"


def process_tag(pid: int | None = None) -> str:
    """Host, process id and start of the process, so that a reused id is another process."""
    pid = os.getpid() if pid is None else pid
    return f"{PREFIX}{socket.gethostname()}:{pid}:{_started(pid)}"


def tag_this_run() -> None:
    """Put this process's tag on the flow run that calls it."""
    run_id, tags = flow_run.get_id(), flow_run.get_tags()
    if run_id is not None:
        with get_client(sync_client=True) as client:
            client.update_flow_run(UUID(run_id), tags=[*tags, process_tag()])


def settle_killed_runs() -> int:
    """Mark runs of this host whose process is gone as Crashed; returns how many."""
    running = FlowRunFilter(
        state=FlowRunFilterState(type=StateTypeFilter(any_=[StateType.RUNNING]))
    )
    settled = 0
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=running):
            if any(_is_gone(tag) for tag in run.tags):
                message = "its process was killed; the same command continues"
                client.set_flow_run_state(run.id, Crashed(message=message), force=True)
                settled += 1
    return settled


def _is_gone(tag: str) -> bool:
    """Whether the tag names a process of this host that no longer exists."""
    if not tag.startswith(f"{PREFIX}{socket.gethostname()}:"):
        return False
    pid = tag.split(":")[2]
    if not pid.isdigit():
        return False
    return not process_exists(int(pid)) or process_tag(int(pid)) != tag


def _started(pid: int) -> str:
    """The kernel's start time of a process; "-" where there is no /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return "-"
    # The name in parentheses may hold spaces; start time is field 22, the 20th after it.
    return text.rsplit(")", 1)[1].split()[19]
