"""What a measurement was taken on, and the JSON file it goes to."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mtk.config.plan import GPUS, Gpu
from mtk.launch.process import Place

GEMM_SIZE = 8192


def surroundings() -> dict[str, Any]:
    """Software, date and commit; the accelerators are asked by :func:`gpus`."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
    }


def commit() -> str | None:
    """The commit of the source tree, "+" after it where files differ; None outside of git."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(here), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write_json(path: str | None, content: dict[str, Any]) -> None:
    """Replace the file as a whole; nothing where there is no path."""
    if path is None:
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(target)


# -- GPUs ---------------------------------------------------------------------------------


def known_gpu(name: str) -> Gpu | None:
    """The entry of ``GPUS`` for a device's name as CUDA gives it; None where its peak is not
    known for sure (PCIe and smaller variants run slower)."""
    words = name.lower().replace("-", " ").split()
    if any(word in ("pcie", "nvl") for word in words):
        return None
    if "a100" in words and "40gb" in words:
        return GPUS["a100-40gb"]
    return next((GPUS[word] for word in words if word in GPUS), None)


def gpus(place: Place, count: int) -> list[dict[str, Any]]:
    """Name, memory and measured bf16 GEMM rate of the first ``count`` GPUs; run it in a process
    of its own (``launch``), so that the one that asks never touches CUDA."""
    del place
    return [_gpu(torch.device("cuda", index)) for index in range(count)]


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    known = known_gpu(properties.name)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "peak_flops": known.peak if known else None,
        "gemm_flops": gemm_rate(device),
    }


def gemm_rate(device: torch.device, size: int = GEMM_SIZE, repeats: int = 20) -> float:
    """FLOP/s of a bf16 product of two square matrices: the best of five means."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    seconds = []
    for _ in range(6):
        _wait(device)
        started = time.perf_counter()
        for _ in range(repeats):
            torch.matmul(a, b, out=out)
        _wait(device)
        seconds.append((time.perf_counter() - started) / repeats)
    return 2.0 * size**3 / min(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
