"""The benchmark of decoding: it generates what the plain model does, and counts what it must."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from mtk.cli.main import main
from mtk.config import make
from mtk.config.bench_decode import DecodeBenchConfig
from mtk.errors import ConfigError, ConversionError
from mtk.log import Reporter
from serving.bench.decode import bench_decode
from serving.bench.decode_costs import cache_bytes, copy_rate, prefill_flops, weight_bytes
from serving.bench.decode_rows import cells, same_tokens
from serving.bench.transformers_speed import Speed, speed_of
from serving.decode_speed import measure_decode, prompts_of
from tests.convert.models import llama, save_native
from tests.models.sizes import small_config
from tests.serving.models import LLAMA_LIKE, MAMBA, greedy_without_cache, tiny_model
from tests.serving.t5_directory import V11, t5_directory


def test_it_decodes_what_the_model_says() -> None:
    model = tiny_model()
    found = measure_decode(model, batch=3, prompt_tokens=5, new_tokens=20, seed=7)
    prompts = prompts_of(257, 3, 5, 7)
    assert [list(row) for row in found.tokens] == [
        greedy_without_cache(model, prompt, 20) for prompt in prompts
    ]
    assert len({tuple(prompt) for prompt in prompts}) == 3
    assert 10 <= len(found.step_seconds) < 20 and min(found.step_seconds) > 0
    assert found.prefill_seconds > 0


def test_seconds_are_those_between_columns() -> None:
    found = speed_of(1.0, [1.5, 1.75, 2.25], [(1, 2, 3)])
    assert found == Speed(0.5, [0.25, 0.5], [(1, 2, 3)])
    other = Speed(0.5, (0.25, 0.5), ((1, 9, 3),))
    assert same_tokens(found, other) == pytest.approx(2 / 3)
    shorter = Speed(0.5, (0.25,), ((1, 2),))
    assert same_tokens(shorter, other) == same_tokens(other, shorter) == pytest.approx(1 / 2)


def test_costs_of_a_model_counted_by_hand() -> None:
    """2 layers, 32 wide, 4 heads of 8 in 2 groups, MLP of 4 x 32, 257 words padded to 384."""
    model = tiny_model(**LLAMA_LIKE, ffn_hidden_size=64)
    # Query and output 32 x 32, key and value 32 x 16, gate, up and down 32 x 64.
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
    output = model.config.padded_vocab_size * 32
    norms = 5 * 32
    assert weight_bytes(model, 7) == 4 * (2 * layer + output + norms)
    assert cache_bytes(model, 3, 10) == 3 * 10 * 2 * (2 * 2 * 8) * 4
    # Two FLOPs a weight and token; scores and values: 2 x 2 x 32 a key that is seen.
    matrices = 2 * 64 * 2 * layer
    seen = 2 * 2 * 32 * 2 * sum(range(1, 65))
    counted = prefill_flops(model.config, 4, 64)
    assert counted == pytest.approx(4 * (matrices + seen + 2 * output), rel=0.003)


def test_tied_and_expert_weights_are_read_once() -> None:
    tied = tiny_model()
    everything = sum(p.numel() for p in tied.parameters())
    positions = tied.embedding.positions.weight.numel()  # type: ignore[union-attr]
    assert weight_bytes(tied, 1) == 4 * (everything - positions)
    sizes = {"num_experts": 4, "moe_router_topk": 1, "moe_ffn_hidden_size": 32}
    mixture = tiny_model(**LLAMA_LIKE, **sizes)
    named = dict(mixture.named_parameters())
    experts = sum(p.numel() for name, p in named.items() if ".experts." in name)
    assert experts > 0
    one, four, many = (weight_bytes(mixture, batch) for batch in (1, 4, 64))
    assert four == many and many - one == pytest.approx(4 * experts * 3 / 4)


def test_memory_is_neither_still_nor_faster_than_any() -> None:
    assert 1e8 < copy_rate(torch.device("cpu")) < 2e12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_native(tmp_path_factory.mktemp("model") / "demo", llama())


def config(load: Path, **changes: object) -> DecodeBenchConfig:
    values = {"load": str(load), "batch": [2], "prompt_tokens": [6], "new_tokens": 16}
    return make(DecodeBenchConfig, **(values | {"device": "cpu", "repeats": 1} | changes))


@contextmanager
def refused(load: str) -> Iterator[Path]:
    raise ConversionError(f"{load} has no counterpart")
    yield Path()


def test_what_cannot_be_compared_is_said(checkpoint: Path) -> None:
    report = bench_decode(config(checkpoint), Reporter(quiet=True), refused)
    assert "no counterpart" in report.skipped
    assert [row.name for row in report.rows] == ["mtk"] and report.rows[0].ratio is None


def test_without_transformers(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    report = bench_decode(config(checkpoint), Reporter(quiet=True), refused)
    assert "not installed" in report.skipped and len(report.rows) == 1


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_rounded_weights(weights: str, checkpoint: Path) -> None:
    """They are small, and nothing stands beside them that would have others."""
    dense = bench_decode(config(checkpoint), Reporter(quiet=True), refused)
    report = bench_decode(config(checkpoint, weights=weights), Reporter(quiet=True), refused)
    assert "--weights" in report.skipped and len(report.rows) == 1
    assert weight_bytes(report.model.model, 1) < weight_bytes(dense.model.model, 1)


def test_positions_are_checked_before_anything_is_measured(checkpoint: Path) -> None:
    limited = config(checkpoint, prompt_tokens=[4, 10**6])
    with pytest.raises(ConfigError, match="positions"):
        bench_decode(limited, Reporter(quiet=True), refused)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--batch", "0"], "at least 1"),
        (["--new-tokens", "1"], "at least 16"),
        (["--device", "cuda"], "no CUDA device"),
        (["--repeats", "0", "--num-threads", "0"], "2 problems"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the CUDA option would be right")
def test_bad_options(
    checkpoint: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "decode", "--load", str(checkpoint), *options]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_beside_transformers(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both generate the same tokens from the same prompts."""
    output = tmp_path / "decode.json"
    shared = ["bench", "decode", "--load", str(checkpoint), "--device", "cpu", "--repeats", "2"]
    sizes = ["--batch", "1", "3", "--prompt-tokens", "8", "--new-tokens", "16"]
    assert main([*shared, *sizes, "--output", str(output)]) == 0
    assert "transformers" in capsys.readouterr().out
    written = json.loads(output.read_text())
    assert written["skipped"] == "" and written["config_digest"] and written["digest"]
    names = [(row["name"], row["batch"]) for row in written["rows"]]
    assert names == [("mtk", 1), ("transformers", 1), ("mtk", 3), ("transformers", 3)]
    for mine, theirs in (written["rows"][:2], written["rows"][2:]):
        assert mine["same"] == 1.0 and theirs["how"] == "static cache, not compiled"
        assert mine["ratio"] == pytest.approx(mine["decode_rate"] / theirs["decode_rate"])
        assert len(mine["runs"]) == 2 and len(theirs["runs"][0]["step_seconds"]) == 15
        assert mine["bandwidth"] * mine["step_seconds"] == pytest.approx(
            theirs["bandwidth"] * theirs["step_seconds"]
        )


@pytest.mark.slow
def test_a_t5_beside_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = t5_directory(tmp_path / "t5", V11)

    @contextmanager
    def itself(load: str) -> Iterator[Path]:
        yield Path(load)

    report = bench_decode(config(folder), Reporter(quiet=True), itself)
    assert report.skipped == "" and report.rows[0].same == 1.0
    assert [(row.name, row.cache) for row in report.rows] == [
        ("mtk", "dense"),
        ("transformers", "static"),
    ]
    # Without the encoder, and what makes keys and values of its states.
    assert report.weight_bytes < 0.6 * sum(p.nbytes for p in report.model.model.parameters())


def test_mamba_is_measured(tmp_path: Path) -> None:
    folder = save_native(tmp_path / "mamba", small_config(**{**MAMBA, "vocab_size": 300}))
    report = bench_decode(config(folder, transformers=False), Reporter(quiet=True), refused)
    [row] = report.rows
    assert row.cache == "dense" and row.decode_rate > 0
    # Two layers of 8 heads: states of 8 x 12 and three inputs of 64 + 2 x 24 channels, fp32.
    assert cache_bytes(report.model.model, 3, 10) == 3 * 2 * (8 * 8 * 12 + 3 * (64 + 48)) * 4


def test_cells_fit_the_columns(checkpoint: Path) -> None:
    from serving.bench.decode_rows import COLUMNS

    report = bench_decode(config(checkpoint, transformers=False), Reporter(quiet=True), refused)
    assert len(cells(report, report.rows[0])) == len(COLUMNS)


def test_guesses_are_measured_beside_single_tokens(tmp_path: Path) -> None:
    """The same tokens in no more steps; what a step brings is counted, not assumed."""
    load = save_native(tmp_path / "long", llama(max_position_embeddings=128))
    asked = config(load, transformers=False, speculation="lookup", prompt_period=3,
                   prompt_tokens=[12], new_tokens=100)  # fmt: skip
    report = bench_decode(asked, Reporter(quiet=True), refused)
    plain, guessed = report.rows
    assert [plain.name, guessed.name] == ["mtk", "mtk, lookup"]
    assert plain.step_tokens == 1 and guessed.step_tokens >= 1 and guessed.same == 1
    assert guessed.ratio == pytest.approx(guessed.decode_rate / plain.decode_rate)
    (run,) = guessed.runs
    seconds = sum(run.step_seconds) / len(run.step_seconds)
    assert guessed.decode_rate == pytest.approx(run.step_tokens / seconds)


def test_prompts_of_a_period() -> None:
    first, second = prompts_of(50, 2, 11, seed=3, period=4)
    assert first == (first[:4] * 3)[:11] and first != second
    assert first[:4] != prompts_of(50, 2, 11, seed=4, period=4)[1][:3]
    assert prompts_of(50, 1, 11, seed=3, period=40) == prompts_of(50, 1, 11, seed=3)
