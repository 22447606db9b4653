"""The import rule: arrows point down only, and the edges stay thin."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("mtk", "stages", "flows", "serving")

# Top to bottom; a module may import from its own layer and from those below.
LAYERS = (
    ("mtk.cli", "mtk.__main__"),
    ("flows",),
    ("stages",),
    ("serving",),
    ("mtk.verification", "mtk.benchmarks"),
    ("mtk.training",),
    (
        "mtk.data",
        "mtk.curation",
        "mtk.checkpoint",
        "mtk.convert",
        "mtk.precision",
        "mtk.evaluation",
        "mtk.quantization",
        "mtk.retrieval",
    ),
    ("mtk.launch",),
    ("mtk.parallel",),
    ("mtk.models",),
    ("mtk.kernels",),
    ("mtk.config", "mtk.artifacts", "mtk.tokenizers", "mtk.errors", "mtk.log", "mtk.session"),
)
# Beyond the layers: what a package must not know even though it lies below it.
FORBIDDEN = {"serving": ("mtk.training",)}
# The training core runs in images that lack these.
ABSENT_IN_CORE = ("prefect", "flask", "nltk", "pydantic", "transformers", "typer", "waitress")
CORE = (
    "mtk.training",
    "mtk.data",
    "mtk.checkpoint",
    "mtk.precision",
    "mtk.launch",
    "mtk.parallel",
    "mtk.models",
    "mtk.kernels",
)


def modules() -> list[tuple[str, Path]]:
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def layer(module: str) -> int | None:
    for index, packages in enumerate(LAYERS):
        if any(inside(module, package) for package in packages):
            return index
    return None


def violations(module: str, imported: set[str]) -> list[str]:
    own = layer(module)
    found = []
    for name in sorted(imported):
        other = layer(name)
        if own is not None and other is not None and other < own:
            found.append(f"{module} imports {name}, which lies above it")
        for package, banned in FORBIDDEN.items():
            if inside(module, package) and any(inside(name, ban) for ban in banned):
                found.append(f"{module} imports {name}")
        if name.split(".")[0] == "prefect" and not inside(module, "flows"):
            found.append(f"{module} imports prefect outside flows")
        if any(inside(module, core) for core in CORE) and name.split(".")[0] in ABSENT_IN_CORE:
            found.append(f"{module} imports {name}, which training images may lack")
    return found


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: str(value))
def test_arrows_point_down(module: str, path: Path) -> None:
    assert violations(module, imports(path)) == []


def test_every_module_has_a_layer() -> None:
    assert [name for name, _ in modules() if name != "mtk" and layer(name) is None] == []


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("mtk.models.gpt", "mtk.parallel.tensor"),
        ("mtk.data.loader", "mtk.training.loop"),
        ("serving.engine", "mtk.training.loop"),
        ("serving.engine", "stages.serve"),
        ("stages.pretrain", "prefect"),
        ("mtk.training.loop", "transformers"),
        ("mtk.config.model", "mtk.cli.main"),
    ],
)
def test_the_rule_bites(module: str, imported: str) -> None:
    assert violations(module, {imported})


def test_no_long_files_and_no_utils() -> None:
    files = [p for package in (*PACKAGES, "tests") for p in (ROOT / package).rglob("*.py")]
    assert [str(p) for p in files if len(p.read_text().splitlines()) > 400] == []
    assert [str(p) for p in files if p.stem in ("utils", "helpers", "common", "misc")] == []


def test_no_global_state() -> None:
    for module, path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not [n for n in ast.walk(tree) if isinstance(n, ast.Global)], module


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import mtk", ("torch", "numpy", "typer")),
        (
            "from mtk.cli.main import main; main(['--help'])",
            ("torch", "prefect", "flask", "numpy", "mtk.config.model"),
        ),
        ("from mtk.cli.main import main; main(['pretrain', '--help'])", ("torch", "prefect")),
        ("from mtk.cli.main import main; main(['verify', 'layout', '--help'])", ("torch", "numpy")),
    ],
)
def test_imports_are_lazy(code: str, absent: tuple[str, ...]) -> None:
    probe = f"{code}\nimport sys\nprint('LOADED', [m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1] == "LOADED []"
