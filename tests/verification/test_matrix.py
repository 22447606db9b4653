"""``mtk verify layout --matrix``: what it runs, records, continues and refuses."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mtk.config import make
from mtk.config.verify import VerifyMatrixConfig
from mtk.parallel.legal_layouts import techniques
from mtk.verification import matrix
from mtk.verification.matrix_models import cases
from mtk.verification.observe import Observation
from tests.verification.runs import verify


def asked(**options: Any) -> VerifyMatrixConfig:
    return make(VerifyMatrixConfig, matrix=True, **options)


def test_most_layouts_of_up_to_eight_ranks_are_legal() -> None:
    found = cases(asked())
    counts = Counter((case.model, case.world) for case in found)
    assert counts["dense", 8] > 600 and counts["moe", 8] > 1500
    assert {world for _, world in counts} == {2, 3, 4, 5, 6, 7, 8}
    assert len({case.key for case in found}) == len(found) > 3500
    worlds = [case.world for case in found]
    assert worlds == sorted(worlds)
    assert all(4 <= case.samples <= 8 for case in found)


def test_the_subset_and_the_choice() -> None:
    pairwise = cases(asked(subset="pairwise", ranks="4"))
    assert 60 < len(pairwise) < 120
    everything = {(c.model, t) for c in cases(asked(ranks="4")) for t in techniques(c.layout)}
    assert everything == {(c.model, t) for c in pairwise for t in techniques(c.layout)}
    some = cases(asked(ranks="2-4", limit=9, seed=5))
    assert len(some) == 9
    assert [c.key for c in some] == [c.key for c in cases(asked(ranks="2-4", limit=9, seed=5))]
    assert [c.key for c in some] != [c.key for c in cases(asked(ranks="2-4", limit=9, seed=6))]


def test_a_handful_and_what_continues_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "records" / "matrix.jsonl"
    words = ["layout", "--matrix", "--ranks", "2", "--subset", "pairwise", "--limit", "5"]
    words += ["--output", str(output)]
    code, found, text = verify(capsys, *words)
    assert code == 0 and found["layouts"] == found["equal"] == 5 and found["failed"] == []
    assert 0 < found["worst"]["gradient"]["error"] < 1e-5
    assert "5 layouts of 2 ranks" in text
    lines = output.read_text().splitlines()
    assert len(lines) == 6 and json.loads(lines[0])["format"] == "mtk-layout-matrix"
    # A kill cuts the last line off; the earlier ones are not run again.
    output.write_text("\n".join(lines)[:-9])
    ran = count_runs(monkeypatch)
    code, found, text = verify(capsys, *words)
    assert code == 0 and found["layouts"] == 5 and "4 of them in" in text
    assert ran == [1]
    assert {json.loads(line)["key"] for line in lines[1:]} == {
        json.loads(line)["key"] for line in output.read_text().splitlines()[1:]
    }
    code, _, text = verify(capsys, *words, "--seed", "7")
    assert code == 4 and "made with another seed" in text and "--force" in text


def count_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layouts of each job with several ranks, as they come."""
    ran: list[int] = []
    whole = matrix._run

    def counted(batch: Any, *rest: Any) -> Any:
        ran.append(len(batch))
        return whole(batch, *rest)

    monkeypatch.setattr(matrix, "_run", counted)
    return ran


class FakePool:
    """Runs nothing; one layout is wrong, another one ends its rank."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.calls = 0

    def close(self) -> None: ...

    def run(self, function: Any, runs: Any, count: int, **_: Any) -> list[list[Observation]]:
        from mtk.errors import WorkerError
        from tests.verification.test_layout import observation

        found = []
        for run in runs:
            layout = run.parallel
            if layout.pipeline_schedule == "zbv":
                raise WorkerError("rank 1 was killed by SIGKILL")
            # Wrong in company only.
            odd = layout.data_parallel_sharding == "full" and len(runs) > 1
            wrong = layout.sequence_parallel or odd
            found.append(observation(1.5 if wrong else 1.0))
        empty = Observation(3.0, 2.0, [], [], (1.0, 2.0))
        return [found, *([[empty] * len(runs)] * (count - 1))]


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_failures_are_told_apart(
    jobs: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix, "RankPool", FakePool)
    monkeypatch.setattr(matrix, "TOGETHER", 4)
    words = ["layout", "--matrix", "--ranks", "2", "--model", "dense", "--jobs", jobs]
    code, found, text = verify(capsys, *words)
    assert code == 5 and found["layouts"] == 21
    failed = set(found["failed"])
    assert {"dense tp2.sp", "dense pp2.zbv"} < failed
    rest = failed - {"dense tp2.sp", "dense pp2.zbv"}
    assert all(key.endswith(".full") for key in rest) and rest
    assert "killed by SIGKILL" in text and "not after other layouts" in text
    assert "gradient of a" in text


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--ranks", "0-9"], "Nearest: 1-8"),
        (["--ranks", "4-2"], "matrix.ranks"),
        (["--jobs", "0"], "matrix.jobs"),
        (["--tp", "2"], "is not read by --matrix"),
        (["--model", "tiny"], "dense"),
    ],
)
def test_bad_options(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, text = verify(capsys, "layout", "--matrix", *words)
    assert code == 2 and named in text


def test_a_foreign_file_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine\n")
    words = ["layout", "--matrix", "--ranks", "2", "--output", str(path)]
    code, _, text = verify(capsys, *words)
    assert code == 4 and "is no record" in text and path.read_text() == "mine\n"


@pytest.mark.slow
@pytest.mark.parametrize("model", ["dense", "moe"])
def test_every_pair_of_techniques(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["layout", "--matrix", "--subset", "pairwise", "--model", model]
    code, found, text = verify(capsys, *words)
    assert code == 0, text
    assert found["equal"] == found["layouts"] > 25
