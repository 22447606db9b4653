"""The ``mtk ...`` commands of scripts and of fenced blocks, as argument lists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SCRIPTS = sorted([*(ROOT / "examples").glob("*.sh"), *(ROOT / "examples").glob("*.slurm")])

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_VARIABLE = re.compile(r"\$\{?(\w+)\}?")
_DEFAULT = re.compile(r"^(\w+)=\$\{\w+:-([^}]*)\}$", re.MULTILINE)


def fenced(page: Path) -> list[tuple[str, str]]:
    """(language, content) of every fenced block of a page."""
    return _FENCE.findall(page.read_text(encoding="utf-8"))


def page_commands(page: Path) -> list[list[str]]:
    """Commands of the page's bash blocks that start with mtk."""
    blocks = [text for language, text in fenced(page) if language == "bash"]
    return [command for text in blocks for command in commands(text)]


def commands(text: str) -> list[list[str]]:
    """Every command line of shell text whose program is mtk, variables replaced by their
    defaults; comments, pipes into mtk and redirections are understood."""
    defaults = dict(_DEFAULT.findall(text))
    joined = text.replace("\\\n", " ")
    found = []
    for line in joined.splitlines():
        line = _VARIABLE.sub(lambda match: defaults.get(match[1], ""), line)
        line = re.sub(r"^\s*LAUNCH=.*", "", line)
        words = shlex.split(line.replace('"$@"', ""), comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words = words[1:]
        if words and words[0] == "mtk":
            end = next(
                (i for i, w in enumerate(words) if w in ("|", "||", ">", "&", "&&")), len(words)
            )
            found.append([word for word in words[1:end] if word != "$@" and word])
    return found
