"""What ``mtk doctor`` looks at; nothing but torch is imported for it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

State = Literal["ok", "missing", "wrong", "absent"]


@dataclass(frozen=True)
class Check:
    """One finding. state: "absent" is an optional package that is not there, and fine."""

    name: str
    state: State
    found: str
    fix: str = ""

    @property
    def bad(self) -> bool:
        return self.state in ("missing", "wrong")


@dataclass(frozen=True)
class Package:
    """lowest (inclusive) and below (exclusive) versions; extra: which extra brings it,
    "" for one that must be there; why: what breaks outside the range."""

    name: str
    lowest: str = ""
    below: str = ""
    extra: str = ""
    why: str = ""


PACKAGES = (
    Package("torch", "2.11", "2.14", why="only this range is tested"),
    Package("numpy", "1.26"),
    Package("typer", "0.20"),
    Package("rich", "13"),
    Package("prefect", "3.8", "3.9", why="3.9 is not tested"),
    Package(
        "fastapi", below="0.151", why="the Prefect server dies with a TypeError about min_items"
    ),
    Package("sqlalchemy", below="2.1", why="Prefect's flows run, but no schedule ever fires"),
    Package("flask", "3.0"),
    Package("waitress", "3.0"),
    Package("nltk", "3.9.1"),
    Package("tokenizers", "0.21"),
    Package("tiktoken", "0.9"),
    Package("safetensors", "0.5"),
    Package("pyyaml", "6"),
    Package("prometheus-client", "0.20"),
    Package("matplotlib", "3.8"),
    Package("transformers", "5", "6", extra="hf"),
    Package("sentencepiece", "0.2", extra="hf"),
    Package("zstandard", "0.22", extra="formats"),
    Package("pyarrow", "16", extra="formats"),
    Package("fastokens", "0.3.5", extra="fast"),
    Package("orjson", "3.10", extra="fast"),
    Package("tensorboard", "2.16", extra="track"),
    Package("numba", "0.60", extra="fast"),
    Package("triton", extra="for fused kernels on CUDA; torch for CUDA brings it"),
    Package("flash-attn", extra="for --attention-backend flash-attn; needs nvcc to build"),
    Package("flash-attn-3", extra="for --attention-backend flash3; needs nvcc to build"),
    Package("flash-attn-4", extra="for --attention-backend flash4"),
    Package("transformer-engine", extra="for --attention-backend transformer-engine"),
    Package("tensorrt-llm", extra="for mtk serve --engine tensorrt-llm; from NVIDIA's own index"),
    Package("mamba-ssm", extra="the CUDA kernels; needs nvcc to build"),
    Package("causal-conv1d", extra="the CUDA kernels; needs nvcc to build"),
)


def all_checks() -> Iterator[Check]:
    """Every finding, cheap ones first."""
    yield _python()
    yield from (check_package(package) for package in PACKAGES)
    yield _torch()
    yield from _backends()
    yield Check("cores", "ok", str(_cores()))
    yield _memory()
    yield _compiler()


def check_package(package: Package, version: str | None = None) -> Check:
    """Judge the installed version (or ``version``) of a package."""
    if version is None:
        try:
            version = metadata.version(package.name)
        except metadata.PackageNotFoundError:
            return _not_there(package)
    low = bool(package.lowest) and _number(version) < _number(package.lowest)
    high = bool(package.below) and _number(version) >= _number(package.below)
    if not (low or high):
        return Check(package.name, "ok", version)
    wanted = ",".join(
        sign + bound for sign, bound in ((">=", package.lowest), ("<", package.below)) if bound
    )
    reason = f" ({package.why})" if package.why else ""
    fix = f"pip install -c constraints.txt '{package.name}{wanted}'{reason}"
    return Check(package.name, "wrong", version, fix)


def _not_there(package: Package) -> Check:
    if package.name in ("fastapi", "sqlalchemy"):
        return Check(package.name, "absent", "not installed", "comes with prefect")
    if not package.extra:
        fix = "pip install -c constraints.txt -e ."
        return Check(package.name, "missing", "not installed", fix)
    if " " in package.extra:
        return Check(package.name, "absent", "not installed", f"optional: {package.extra}")
    fix = f"optional: pip install -c constraints.txt -e '.[{package.extra}]'"
    return Check(package.name, "absent", "not installed", fix)


def _number(version: str) -> tuple[int, ...]:
    """2.13.0+cpu -> (2, 13, 0); suffixes of a part are cut off, missing parts are zero."""
    parts = version.split("+")[0].split(".")[:4]
    digits = [_leading_digits(part) for part in parts]
    numbers = [int(part) if part else 0 for part in digits]
    return (*numbers, *([0] * (4 - len(numbers))))


def _leading_digits(part: str) -> str:
    end = next((i for i, c in enumerate(part) if not c.isdigit()), len(part))
    return part[:end]


def _python() -> Check:
    return check_package(Package("python", "3.11"), platform.python_version())


def _torch() -> Check:
    try:
        import torch
    except Exception as error:  # a broken build fails in many ways
        return Check("torch import", "wrong", repr(error), "reinstall torch by constraints.txt")
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return Check("devices", "ok", f"{torch.cuda.device_count()} x {', '.join(sorted(names))}")
    return Check("devices", "ok", f"CPU only, {torch.get_num_threads()} threads")


def _backends() -> Iterator[Check]:
    """What ranks talk with: gloo for CPU tensors, NCCL for CUDA's."""
    try:
        import torch
        import torch.distributed as dist
    except Exception:  # said above already
        return
    fix = "this torch was built without it: reinstall torch by constraints.txt"
    gloo = dist.is_available() and dist.is_gloo_available()
    yield Check("gloo", "ok", "built in") if gloo else Check("gloo", "wrong", "absent", fix)
    if not torch.cuda.is_available():
        yield Check("nccl", "absent", "no CUDA device", "only ranks on GPUs need it")
    elif dist.is_available() and dist.is_nccl_available():
        version = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        yield Check("nccl", "ok", ".".join(map(str, version)))
    else:
        yield Check("nccl", "wrong", "absent", fix)


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # only Linux has it
        return os.cpu_count() or 1


def _memory() -> Check:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return Check("memory", "ok", "unknown")
    return Check("memory", "ok", f"{total / 2**30:.1f} GiB")


def _compiler() -> Check:
    import shutil

    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler:
        return Check("C compiler", "ok", compiler)
    return Check("C compiler", "absent", "not found", "optional: --compile needs one")
