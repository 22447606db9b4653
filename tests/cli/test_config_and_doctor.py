"""mtk config show, doctor, plan, recipes, flow list."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from mtk.cli.doctor_checks import PACKAGES, check_package
from mtk.cli.main import main

PRETRAIN = ["--recipe", "gpt-tiny", "--mock-data", "--vocab-size", "100", "--train-iters", "3"]


def test_origins_name_every_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("lr: 0.5\n")
    arguments = [*PRETRAIN, "--save", "x", "--config", str(file), "--set", "model.num_layers=7"]
    assert main(["config", "show", "pretrain", "--origin", *arguments]) == 0
    out = capsys.readouterr().out
    for line in (
        "  num_layers: 7  # --set",
        "  vocab_size: 100  # command line",
        "  hidden_size: 192  # recipe gpt-tiny",
        f"  lr: 0.5  # {file}",
        "  ffn_hidden_size: 512  # derived",
        "  init_method_std: 0.02  # default",
    ):
        assert line in out.splitlines()


def test_shown_configuration_reads_back_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "show", "pretrain", *PRETRAIN, "--save", "x"]) == 0
    first = capsys.readouterr().out
    assert yaml.safe_load(first)["model"]["num_layers"] == 4
    (tmp_path / "again.yaml").write_text(first)
    assert main(["config", "show", "pretrain", "--config", str(tmp_path / "again.yaml")]) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ("stage", "usage"),
    [
        ([], "Usage: mtk config show STAGE"),
        (["pretrain"], "Usage: mtk config show pretrain"),
        (["tokenizer", "train"], "Usage: mtk config show tokenizer train"),
    ],
)
def test_show_has_help(stage: list[str], usage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", *stage, "--help"]) == 0
    assert usage in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pretran"], "Did you mean pretrain?"),
        ([], "There are:"),
        (["pretrain", "--nun-layers", "3"], "--num-layers"),
        (["pretrain", *PRETRAIN, "--save", "x", "--lr", "-1"], "must be greater than 0"),
    ],
)
def test_show_refuses_what_the_stage_refuses(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "show", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "version", "state"),
    [
        ("fastapi", "0.150.9", "ok"),
        ("fastapi", "0.165.0", "wrong"),
        ("sqlalchemy", "2.0.58", "ok"),
        ("sqlalchemy", "2.1.0b1", "wrong"),
        ("torch", "2.13.0+cpu", "ok"),
        ("torch", "2.14.0", "wrong"),
        ("torch", "2.9.1", "wrong"),
        ("nltk", "3.9", "wrong"),
        ("transformers", "6.0.0", "wrong"),
    ],
)
def test_doctor_judges_versions(name: str, version: str, state: str) -> None:
    package = next(package for package in PACKAGES if package.name == name)
    check = check_package(package, version)
    assert check.state == state
    assert bool(check.fix) == (state == "wrong")


def test_doctor_knows_every_dependency_of_the_project() -> None:
    import re
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"]:
        name = re.split(r"[<>=!~;\[ ]", requirement)[0]
        package = next(package for package in PACKAGES if package.name == name)
        bounds = dict(re.findall(r"(>=|<)([\d.]+)", requirement))
        assert (package.lowest, package.below) == (bounds.get(">=", ""), bounds.get("<", ""))


def test_doctor_exit_code_follows_its_findings(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[0])
    assert code == (4 if result["bad"] else 0)
    checks = {check["name"]: check["state"] for check in result["checks"]}
    assert {"python", "torch", "cores", "memory", "nccl"} <= set(checks)
    assert checks["gloo"] == "ok"


@pytest.mark.parametrize(
    ("recipe", "vocabulary", "size", "kernel"),
    [
        ("llama2-7b", "32000", "6,738,415,616", "--use-flash-attn"),
        ("t5-220m", "32128", "223,578,496", "PyTorch's own for masks"),
    ],
)
def test_plan_prints_an_estimate_and_says_so(
    recipe: str, vocabulary: str, size: str, kernel: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--recipe", recipe, "--vocab-size", vocabulary, "--gpus", "8"]
    assert main(["plan", *arguments, "--use-distributed-optimizer"]) == 0
    out = capsys.readouterr().out
    assert f"{size} parameters" in out and "nothing below was measured" in out
    assert "DP 8" in out and "assumed MFU of 40%" in out
    assert kernel in out and "This version" not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "7", "--tp", "2"], "Nearest: 6 or 8, or --tp 1."),
        (["--gpus", "6", "--global-batch-size", "16"], "data-parallel size = 4 x 6 = 24"),
        (["--tp", "3"], "must divide model.num_attention_heads"),
        (["--gpu", "h300"], "must be one of"),
        (["--mfu", "40"], "(0, 1]"),
    ],
)
def test_plan_refuses_impossible_layouts(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--recipe", "gpt-345m", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_recipes_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    from mtk.config.recipes import RECIPES, VOCABULARIES

    assert main(["recipes", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["recipes"]
    assert set(found) == set(RECIPES) > set(VOCABULARIES)
    # Of the released weights.
    assert found["llama3-8b"]["parameters"] == 8_030_261_248
    assert found["mixtral-8x7b"]["parameters"] == 46_702_792_704
    assert found["mamba2-130m"]["parameters"] == 128_989_632
    assert (
        main(["plan", "--recipe", "llama3-8b", "--gpus", "64", "--use-distributed-optimizer"]) == 0
    )
    assert "8,030,261,248 parameters" in capsys.readouterr().out


def test_flow_list_and_unknown_flow(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flow", "list"]) == 0
    assert "end_to_end" in capsys.readouterr().out
    assert main(["flow", "run", "end_to_edn", "--config", "x.yaml"]) == 2
    assert "Did you mean end_to_end?" in capsys.readouterr().err
