"""Publishing, reading, verifying, lineage."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mtk.artifacts import (
    Artifact,
    completed,
    input_file,
    lineage_lines,
    open_artifact,
    publish_directory,
    publish_prefix,
    verify,
    verify_lineage,
)
from mtk.artifacts.staging import staging_prefix
from mtk.config import make
from mtk.config.optimization import OptimizerConfig
from mtk.errors import ArtifactError, DataError

CONFIG = make(OptimizerConfig, lr=1e-3)


def directory(path: Path, text: str = "hello", inputs: Any = (), force: bool = False) -> Artifact:
    with publish_directory(
        path, kind="checkpoint", stage="pretrain", config=CONFIG, inputs=inputs, force=force
    ) as publication:
        (publication.folder / "weights").write_text(text)
        (publication.folder / "sub").mkdir()
        (publication.folder / "sub" / "more").write_text("more")
        publication.metrics["loss"] = 1.5
    return publication.artifact


def dataset(prefix: Path, inputs: Any = (), force: bool = False, text: str = "data") -> Artifact:
    with publish_prefix(
        prefix, kind="dataset", stage="preprocess", config=CONFIG, inputs=inputs, force=force
    ) as publication:
        (publication.folder / f"{prefix.name}_text.bin").write_text(text)
        (publication.folder / f"{prefix.name}.tokenizer").mkdir()
        (publication.folder / f"{prefix.name}.tokenizer" / "vocab").write_text("a b")
    return publication.artifact


def test_directory_round_trip(tmp_path: Path) -> None:
    made = directory(tmp_path / "out")
    read = open_artifact(tmp_path / "out", "checkpoint")
    assert read == made and read.digest == made.digest
    assert [entry.path for entry in read.files] == ["sub/more", "weights"]
    assert read.metrics == {"loss": 1.5} and read.config["lr"] == 1e-3
    assert read.versions["python"] and read.timings["seconds"] >= 0  # type: ignore[operator]
    verify(read)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_prefix_round_trip(tmp_path: Path) -> None:
    made = dataset(tmp_path / "my")
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["my.artifact.json", "my.tokenizer", "my_text.bin"]
    assert made.path == tmp_path / "my"
    for path in ("my", "my.artifact.json"):
        assert open_artifact(tmp_path / path).digest == made.digest


def test_digest_is_of_content_not_of_place_or_time(tmp_path: Path) -> None:
    one, same = directory(tmp_path / "a"), directory(tmp_path / "b")
    assert one.digest == same.digest != directory(tmp_path / "c", "other").digest


def test_digest_does_not_depend_on_the_prefix(tmp_path: Path) -> None:
    assert dataset(tmp_path / "one").digest == dataset(tmp_path / "another").digest


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> None:
        with publish_directory(
            tmp_path / "out", kind="checkpoint", stage="x", config=CONFIG
        ) as publication:
            (publication.folder / "weights").write_text("half")
            raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError):
        broken()
    assert list(tmp_path.iterdir()) == []


def test_existing_output_needs_force(tmp_path: Path) -> None:
    directory(tmp_path / "out")
    with pytest.raises(ArtifactError, match="--force"):
        directory(tmp_path / "out", "new")
    assert (tmp_path / "out" / "weights").read_text() == "hello"
    assert directory(tmp_path / "out", "new", force=True).metrics == {"loss": 1.5}
    assert (tmp_path / "out" / "weights").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_users_folder_is_never_replaced_unasked(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis").write_text("years of work")
    with pytest.raises(ArtifactError, match="not a complete artifact"):
        directory(tmp_path / "home")
    assert (tmp_path / "home" / "thesis").is_file()


def test_leftovers_of_dead_processes_are_removed(tmp_path: Path) -> None:
    own = staging_prefix("out")
    dead = tmp_path / own.replace(f"-{os.getpid()}-", "-999999999-abc")
    alive = tmp_path / own.replace(f"-{os.getpid()}-", f"-{os.getppid()}-abc")
    for folder in (dead, alive):
        folder.mkdir()
    directory(tmp_path / "out")
    assert not dead.exists() and alive.exists()


@pytest.mark.parametrize("damage", ["gone", "longer", "manifest", "kind", "marker", "newer"])
def test_damage_is_refused(tmp_path: Path, damage: str) -> None:
    made = directory(tmp_path / "out")
    manifest = json.loads(made.marker.read_text())
    if damage == "gone":
        (made.folder / "weights").unlink()
    elif damage == "longer":
        (made.folder / "weights").write_text("hello!")
    elif damage == "manifest":
        made.marker.write_text(made.marker.read_text()[:-30])
    elif damage == "kind":
        made.marker.write_text(json.dumps({**manifest, "kind": "dataset"}))
    elif damage == "marker":
        made.marker.unlink()
    else:
        made.marker.write_text(json.dumps({**manifest, "schema_version": 99}))
    with pytest.raises(ArtifactError) as error:
        open_artifact(tmp_path / "out", "checkpoint")
    assert error.value.exit_code == 4 and str(made.folder) in str(error.value)


def test_same_size_change_is_found_by_hash(tmp_path: Path) -> None:
    made = directory(tmp_path / "out")
    (made.folder / "weights").write_text("jello")
    open_artifact(tmp_path / "out")
    with pytest.raises(ArtifactError, match="SHA-256"):
        verify(made)


def chain(tmp_path: Path) -> Artifact:
    (tmp_path / "corpus.jsonl").write_text('{"text": "a"}\n')
    data = dataset(tmp_path / "my", [input_file(tmp_path / "corpus.jsonl", "corpus")])
    return directory(tmp_path / "out", inputs=[data.as_input("training data")])


def test_lineage_reaches_the_corpus(tmp_path: Path) -> None:
    model = chain(tmp_path)
    checked = verify_lineage(model)
    assert list(checked.values()) == ["verified"] * 3
    lines = lineage_lines(model, checked)
    assert len(lines) == 3 and "corpus.jsonl" in lines[2] and "[verified]" in lines[2]


def test_lineage_survives_deletion_but_not_replacement(tmp_path: Path) -> None:
    model = chain(tmp_path)
    (tmp_path / "my.artifact.json").unlink()
    assert sorted(verify_lineage(model).values()) == ["gone", "verified", "verified"]
    (tmp_path / "corpus.jsonl").write_text('{"text": "b"}\n')
    with pytest.raises(ArtifactError, match="replaced"):
        verify_lineage(model)


def test_lineage_finds_a_changed_input_artifact(tmp_path: Path) -> None:
    model = chain(tmp_path)
    dataset(tmp_path / "my", force=True, text="other")
    with pytest.raises(ArtifactError, match="my"):
        verify_lineage(model)


def test_skip_only_for_same_config_and_inputs(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("x")
    inputs = [input_file(tmp_path / "in", "corpus")]
    directory(tmp_path / "out", inputs=inputs)
    ask: dict[str, Any] = {"stage": "pretrain", "config": CONFIG, "inputs": inputs}
    assert completed(tmp_path / "out", **ask)
    assert not completed(tmp_path / "out", **(ask | {"stage": "finetune"}))
    assert not completed(tmp_path / "out", **(ask | {"config": make(OptimizerConfig, lr=1)}))
    (tmp_path / "in").write_text("y")
    assert not completed(
        tmp_path / "out", **(ask | {"inputs": [input_file(tmp_path / "in", "corpus")]})
    )
    (tmp_path / "out" / "weights").unlink()
    assert not completed(tmp_path / "out", **ask)


def test_missing_input_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        input_file(tmp_path / "nothing.jsonl", "corpus")


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be written"):
        directory(tmp_path / "file" / "out")


def named(path: Path, name: str = "") -> Artifact:
    with publish_prefix(path, kind="dataset", stage="preprocess", config=CONFIG) as publication:
        (publication.folder / f"{path.name}{name or '.bin'}").write_text("data")
    return publication.artifact


def test_a_dotted_prefix_is_not_its_beginning(tmp_path: Path) -> None:
    named(tmp_path / "x")
    with pytest.raises(ArtifactError, match="is absent"):
        open_artifact(tmp_path / "x.v2")
    assert open_artifact(tmp_path / "x.bin").path == tmp_path / "x"
    assert named(tmp_path / "y", ".a.b.txt").path == tmp_path / "y"
    assert open_artifact(tmp_path / "y.a.b.txt").path == tmp_path / "y"


def test_a_folder_and_a_prefix_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "same"
    first, second = directory(path), named(path)
    for artifact in (first, second):
        again = completed(path, stage=artifact.stage, config=CONFIG, inputs=())
        assert again is not None
        assert again.marker == artifact.marker
        assert open_artifact(path, artifact.kind).marker == artifact.marker
        user = directory(
            tmp_path / artifact.kind, artifact.kind, inputs=[artifact.as_input("input")]
        )
        assert set(verify_lineage(user).values()) == {"verified"}


@pytest.mark.parametrize("at", [1, 2], ids=["files", "marker"])
def test_an_interrupted_publication_leaves_no_files(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []

    def interrupted(path: Path) -> None:
        synced.append(path)
        if synced.count(tmp_path) == at:
            raise KeyboardInterrupt

    monkeypatch.setattr("mtk.artifacts.publish.sync_folder", interrupted)
    with pytest.raises(KeyboardInterrupt):
        named(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_old_files_go_before_new_ones_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between two renames must not leave new data beside an old index."""
    seen: list[set[str]] = []
    replace = Path.replace

    def watched(path: Path, target: Path) -> Path:
        if target.parent == tmp_path and target.name.startswith("x."):
            seen.append({entry.name for entry in tmp_path.glob("x.*")})
        return replace(path, target)

    for force in (False, True):
        with publish_prefix(
            tmp_path / "x", kind="dataset", stage="preprocess", config=CONFIG, force=force
        ) as publication:
            for name in ("x.bin", "x.idx"):
                (publication.folder / name).write_text(name)
            monkeypatch.setattr(Path, "replace", watched)
    assert seen == [set(), {"x.bin"}, {"x.bin", "x.idx"}] * 2


@pytest.mark.parametrize("absolute", [True, False], ids=["absolute", "relative"])
def test_lineage_after_a_move_and_from_elsewhere(
    absolute: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    (work / "data").mkdir(parents=True)
    (work / "data" / "c.jsonl").write_text("corpus")
    monkeypatch.chdir(work)
    start = work if absolute else Path()
    corpus = input_file(start / "data/c.jsonl", "corpus")
    first = directory(start / "runs/first", "first", inputs=[corpus])
    directory(start / "runs/second", "second", inputs=[first.as_input("model")])
    work.rename(tmp_path / "moved")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "data").mkdir(parents=True)
    (elsewhere / "data" / "c.jsonl").write_text("another")
    monkeypatch.chdir(elsewhere)
    second = open_artifact(tmp_path / "moved/runs/second")
    assert list(verify_lineage(second).values()) == ["verified"] * 3
    (tmp_path / "moved/runs/first/weights").write_text("FIRST")
    with pytest.raises(ArtifactError, match="changed after it was published"):
        verify_lineage(second)


def test_files_of_one_artifact_are_different_inputs(tmp_path: Path) -> None:
    """They share its digest; a stage that has read one has not read the other."""
    with publish_prefix(
        tmp_path / "my", kind="corpus", stage="corpus", config=CONFIG
    ) as publication:
        for name in ("my.jsonl", "my.heldout.txt"):
            (publication.folder / name).write_text("same")
    first, second = "my.jsonl", "my.heldout.txt"
    inputs = [input_file(tmp_path / first, "corpus")]
    directory(tmp_path / "out", inputs=inputs)
    ask: dict[str, Any] = {"stage": "pretrain", "config": CONFIG}
    assert completed(tmp_path / "out", **ask, inputs=inputs)
    other = [input_file(tmp_path / second, "corpus")]
    assert not completed(tmp_path / "out", **ask, inputs=other)
    assert inputs[0].digest == other[0].digest and inputs[0].part == ".jsonl"
    model = open_artifact(tmp_path / "out")
    assert "(.jsonl)" in "\n".join(lineage_lines(model))
    assert list(verify_lineage(model).values()) == ["verified"] * 2
