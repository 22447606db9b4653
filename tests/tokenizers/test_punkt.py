"""Sentence splitting: the reference's example, losslessness, offline parameters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mtk.tokenizers import punkt
from mtk.tokenizers.punkt import PunktSplitter, learn_parameters, write_parameters
from tests.tokenizers.samples import CORPUS, TRICKY, asset

EXAMPLE = "Hello world.  This is two.\n\nNew para here! Is it?\nYes."
SENTENCES = ["Hello world.", "This is two.", "New para here!", "Is it?", "Yes."]
KEPT = ["Hello world.  ", "This is two.\n\n", "New para here! ", "Is it?\n", "Yes."]


@pytest.fixture(scope="module")
def parameters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("punkt") / "punkt.json"
    write_parameters(learn_parameters(CORPUS, "english"), path)
    return path


def test_the_example_of_the_reference(parameters: Path) -> None:
    assert PunktSplitter(str(parameters), False).split(EXAMPLE) == SENTENCES
    assert PunktSplitter(str(parameters), True).split(EXAMPLE) == KEPT


@pytest.mark.parametrize(
    "text", [*TRICKY, "  \n lead. Tail. \n\n", "One. " * 50, "\n", "a.b.c!? d"]
)
def test_lossless_with_the_same_boundaries(parameters: Path, text: str) -> None:
    plain = PunktSplitter(str(parameters), False).split(text)
    kept = PunktSplitter(str(parameters), True).split(text)
    assert "".join(kept) == text
    if plain:
        assert [sentence.strip() for sentence in kept] == [sentence.strip() for sentence in plain]
    else:
        assert kept == ([text] if text else [])


def test_abbreviations_are_known(parameters: Path) -> None:
    text = "Dr. Smith met Mr. J. Jones in Jan. at the U.S. embassy. They spoke."
    assert len(PunktSplitter(str(parameters), False).split(text)) == 2


def test_blocks(parameters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(punkt, "BLOCK", 20)
    assert "".join(PunktSplitter(str(parameters), True).split(EXAMPLE)) == EXAMPLE


def test_learning_is_deterministic_and_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parameters(learn_parameters(CORPUS * 3, "english"), tmp_path / "a")
    write_parameters(learn_parameters(iter(CORPUS * 3), "english"), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    monkeypatch.setattr(punkt, "TRAINING_BYTES", 150)
    taken = []

    def texts() -> object:
        for text in CORPUS:
            taken.append(text)
            yield text

    learn_parameters(texts(), "german")  # type: ignore[arg-type]
    assert len(taken) == 2


def test_installed_data_is_used() -> None:
    """NLTK's own model and our copy of its parameters split alike."""
    folder = asset("nltk_data")
    text = f"{EXAMPLE} Dr. Strabismus (whom God preserve) of Utrecht. He works at 5 p.m. daily."
    program = f"""
import json, sys, tempfile, pathlib
from nltk.tokenize import sent_tokenize
from mtk.tokenizers.punkt import *
found = find_parameters("english")
assert found["origin"] == "nltk punkt_tab"
assert find_parameters("klingon") is None
assert find_parameters("../english") is None
path = pathlib.Path(tempfile.mkdtemp()) / "p.json"
write_parameters(found, path)
text = {text!r}
assert PunktSplitter(str(path), False).split(text) == sent_tokenize(text)
assert "".join(PunktSplitter(str(path), True).split(text)) == text
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"NLTK_DATA": str(folder), "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
