"""A rank's place from the variables that Slurm's ``srun`` sets for every task."""

from __future__ import annotations

import re
from collections.abc import Mapping

from mtk.errors import LayoutError

# Below the ports that kernels hand out by themselves, so that nothing else sits there.
_PORTS = range(12000, 28000)


def first_host(nodes: str) -> str:
    """The first host of a list like ``gpu[003-007,9],login``."""
    first = re.split(r",(?![^\[]*\])", nodes.strip())[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def tasks_on_node(counts: str, node: int) -> int:
    """The tasks on node number ``node``, from a list like ``8(x2),4``. Raises ValueError."""
    expanded: list[int] = []
    for part in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ValueError(f"{counts!r} is no list of task counts")
        expanded += [int(match[1])] * int(match[2] or 1)
    if node >= len(expanded):
        raise ValueError(f"{counts!r} has no node number {node}")
    return expanded[node]


def master(environment: Mapping[str, str]) -> tuple[str, int]:
    """Where rank 0 listens: MASTER_ADDR and MASTER_PORT, else the first node and a port made
    from the job's number, the same on every node. Raises LayoutError."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST")
    nodes = nodes or environment.get("SLURM_JOB_NODELIST", "")
    address = environment.get("MASTER_ADDR") or first_host(nodes)
    if not address:
        raise LayoutError(
            "Slurm's environment has no SLURM_NODELIST to find rank 0's host in. Export "
            "MASTER_ADDR (and MASTER_PORT), or start the job with srun."
        )
    port = environment.get("MASTER_PORT", "")
    if port:
        if not port.isdecimal() or not 0 < int(port) < 65536:
            raise LayoutError(f"MASTER_PORT = {port!r}: must be a port, 1 to 65535.")
        return address, int(port)
    job = re.sub(r"\D", "", environment.get("SLURM_JOB_ID", "")) or "0"
    step = re.sub(r"\D", "", environment.get("SLURM_STEP_ID", "")) or "0"
    return address, _PORTS[(int(job) * 7 + int(step)) % len(_PORTS)]


def require_srun(environment: Mapping[str, str]) -> None:
    """Raises LayoutError in a batch script that books many tasks but starts this program once,
    which would wait for the others until the timeout."""
    if "SLURM_STEP_ID" in environment or "SLURM_STEPID" in environment:
        return
    tasks = environment.get("SLURM_NTASKS", "1")
    if tasks != "1":
        raise LayoutError(
            f"Slurm booked {tasks} tasks, but this program was not started by srun: the other "
            f"ranks would never come. Write srun before the command, or book --ntasks=1 and use "
            f"--nproc."
        )


def tasks_here(environment: Mapping[str, str], world: int) -> int:
    """Tasks of this step on this node. Raises LayoutError."""
    counts = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get(
        "SLURM_TASKS_PER_NODE", ""
    )
    if not counts:
        return world
    node = environment.get("SLURM_NODEID", "0")
    try:
        return tasks_on_node(counts, int(node))
    except ValueError as error:
        raise LayoutError(f"SLURM_TASKS_PER_NODE, SLURM_NODEID = {node!r}: {error}.") from None
