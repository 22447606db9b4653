"""English technical prose that every Python brings: its topics and its docstrings.

Sources are read with :mod:`ast`, never imported. For one Python release the documents and
their order are always the same.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED = frozenset(
    [
        "test",
        "tests",
        "idlelib",
        "turtledemo",
        "lib2to3",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "ensurepip",
        "idle_test",
        "pydoc_data",
        "lib-dynload",
        "__phello__",
    ]
)
SHORTEST = 120  # characters
HELDOUT_PER_MILLE = 40

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Document:
    """source: where the text comes from, e.g. "stdlib:collections/OrderedDict"."""

    text: str
    source: str

    @property
    def is_heldout(self) -> bool:
        """A fixed 4 % of all documents, by name."""
        return int(_digest(f"heldout:{self.source}")[:8], 16) % 1000 < HELDOUT_PER_MILLE


def demo_documents() -> list[Document]:
    """All documents in an order that makes every stretch a fair sample."""
    kept: dict[str, Document] = {}
    for document in [*topic_documents(), *library_documents(library_folder())]:
        if len(document.text) >= SHORTEST:
            kept.setdefault(document.text, document)
    return sorted(kept.values(), key=lambda document: _digest(document.source + document.text))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def topics_file() -> Path:
    """The file of the language reference's topics; it names its Python release."""
    from pydoc_data import topics

    return Path(str(topics.__file__))


def library_folder() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def topic_documents() -> Iterator[Document]:
    """The topics that ``help("...")`` shows, from the language reference."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Document(_tidy(text), f"pydoc:{name}")


def library_documents(folder: Path) -> Iterator[Document]:
    """A document a module (with its functions) and one a class (with its methods)."""
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
        relative = path.relative_to(folder)
        if SKIPPED & set(relative.parts[:-1]) or relative.name.startswith(("test_", "_sysconfig")):
            continue
        tree = _parsed(path)
        if tree is not None:
            parts = relative.with_suffix("").parts
            module = "/".join(parts[:-1] if parts[-1] == "__init__" and parts[1:] else parts)
            yield from _module_documents(tree, module)


def _parsed(path: Path) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old sources
            return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError):
        return None


def _module_documents(tree: ast.Module, module: str) -> Iterator[Document]:
    name = module.replace("/", ".")
    functions = [node for node in tree.body if isinstance(node, Definition) and not _is_class(node)]
    yield Document(_described(name, tree, functions), f"stdlib:{module}")
    for node, path in _classes(tree.body, ""):
        members = [item for item in node.body if isinstance(item, Definition)]
        title = f"class {name}.{path}"
        methods = [item for item in members if not _is_class(item)]
        yield Document(_described(title, node, methods), f"stdlib:{module}/{path}")


def _is_class(node: ast.AST) -> bool:
    return isinstance(node, ast.ClassDef)


def _classes(body: Iterable[ast.stmt], outer: str) -> Iterator[tuple[ast.ClassDef, str]]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            path = f"{outer}{node.name}"
            yield node, path
            yield from _classes(node.body, f"{path}.")


def _described(title: str, owner: ast.Module | ast.ClassDef, members: Iterable[Definition]) -> str:
    """Title, docstring, and each documented member; "" if nothing is documented."""
    parts = [docstring] if (docstring := _docstring(owner)) else []
    for member in members:
        if docstring := _docstring(member):
            parts.append(f"{member.name}{_signature(member)}\n\n{docstring}")
    return _tidy("\n\n".join([title, *parts])) if parts else ""


def _docstring(node: ast.Module | Definition) -> str:
    return inspect.cleandoc(ast.get_docstring(node, clean=False) or "")


def _signature(node: Definition) -> str:
    return "" if isinstance(node, ast.ClassDef) else f"({ast.unparse(node.args)})"


def _tidy(text: str) -> str:
    """No trailing spaces, no runs of empty lines, only characters that UTF-8 can hold."""
    lines = [line.rstrip() for line in inspect.cleandoc(text).splitlines()]
    kept: list[str] = []
    for line in lines:
        if line or (kept and kept[-1]):
            kept.append(line)
    return "\n".join(kept).strip().encode(errors="replace").decode()
