"""The benchmark of a server: what is sent, what is measured, what is counted."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mtk.cli.main import main
from mtk.config import make
from mtk.config.bench_serve import ServeBenchConfig
from mtk.config.lengths import parse_lengths
from mtk.errors import ConfigError, WorkerError
from mtk.log import Reporter
from serving.app import create_app
from serving.bench.load import Asked, Load, Measured, questions
from serving.bench.serve import bench_serve, cells
from serving.bench.summary import Spread, plain, summarize
from serving.client import Client
from serving.torch_engine import TorchEngine
from tests.convert.models import gpt2_config, save_native
from tests.serving.conftest import settings
from tests.serving.scripted import Script, scripted


def config(url: str = "127.0.0.1:1", **changes: Any) -> ServeBenchConfig:
    values = {"url": url, "requests": 6, "warmup": 1, "prompt_tokens": "4", "new_tokens": "5"}
    return make(ServeBenchConfig, **(values | changes))


@pytest.fixture
def script() -> Iterator[Script]:
    with scripted() as found:
        yield found


@pytest.mark.parametrize(
    ("text", "low", "high", "mean"),
    [
        ("7", 7, 7, 7.0),
        ("3-9", 3, 9, 6.0),
        ("normal:50:5", 25, 75, 50.0),
        ("lognormal:20:0.5", 1, 200, 20 * 1.133),
    ],
)
def test_lengths(text: str, low: int, high: int, mean: float) -> None:
    source = random.Random(0)
    drawn = [parse_lengths(text).draw(source, 1000) for _ in range(4000)]
    assert low <= min(drawn) and max(drawn) <= high
    assert statistics.mean(drawn) == pytest.approx(mean, rel=0.03)
    assert parse_lengths(text).draw(source, 2) <= 2


@pytest.mark.parametrize("text", ["", "0", "-3", "9-3", "normal:5", "lognormal:0:1", "x", "inf"])
def test_no_lengths(text: str) -> None:
    with pytest.raises(ConfigError, match="prompt_tokens"):
        config(prompt_tokens=text)


def test_arrivals() -> None:
    load = config(requests=4000, rate=[10.0]).traffic
    due = [one.due for one in questions(load, range(9), None, 10.0, 1)]
    gaps = [later - earlier for earlier, later in pairwise(due)]
    # Of a Poisson process the gaps' mean and deviation are both 1 / rate.
    assert statistics.mean(gaps) == pytest.approx(0.1, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.1, rel=0.07)
    even = config(requests=5, arrivals="even").traffic
    assert [one.due for one in questions(even, range(9), None, 2.0, 1)] == [0, 0.5, 1, 1.5, 2]


def test_questions_repeat_and_differ() -> None:
    load = config(prompt_tokens="3-30", shared_prefix=4).traffic
    first, again = (questions(load, range(100), 40, None, 1) for _ in range(2))
    assert first == again != questions(load, range(100), 40, None, 2)
    assert len({one.prompt[:4] for one in first}) == 1 and len({one.prompt for one in first}) == 6
    assert all(len(one.prompt) + one.new_tokens <= 40 for one in first)


def test_figures_of_a_point() -> None:
    fine = [
        Measured(0.0, 0.0, 4.0, (1.0, 2.0, 4.0), 10, 3, "length"),
        Measured(1.0, 1.5, 8.0, (4.0, 8.0), 20, 5, "stop"),
    ]
    failed = [Measured(2.0, 2.0, 3.0, (2.5,), error="HTTP 429")] * 2
    point = summarize([*fine, *failed], clients=2, max_first=2.0, max_token=2.0)
    assert (point.answered, point.errors, point.seconds) == (2, {"HTTP 429": 2}, 8.0)
    assert (point.tokens_per_second, point.requests_per_second) == (1.0, 0.25)
    assert point.first == Spread(2.0, 2.8, 2.98, 2.0, 3.0)  # 1 and 4 - 1
    assert point.gap and point.gap.p50 == 2.0 and point.gap.most == 4.0  # 1, 2, 4
    assert point.each_token and point.each_token.mean == pytest.approx((1.5 + 1.0) / 2)
    assert point.whole and point.whole.mean == 5.5 and point.late == 0.5
    assert point.goodput == pytest.approx(1 / 8)  # the second one's first text came after 3 s
    assert cells(point)[2] == "2 x HTTP 429"
    assert json.loads(json.dumps(plain(point)))["first"]["p90"] == pytest.approx(2.8)


def test_nothing_answered() -> None:
    point = summarize([Measured(0, 0, 1, error="timed out")], rate=2.0)
    assert (point.first, point.tokens_per_second, point.goodput) == (None, 0.0, None)
    assert cells(point)[:3] == ["2 requests/s", "0", "1 x timed out"]


class Slow:
    """Stands for a client whose server answers one request at a time, each in ``seconds``."""

    def __init__(self, seconds: float) -> None:
        import threading

        self._seconds, self._lock, self.most, self._now = seconds, threading.Lock(), 0, 0

    def stream(self, prompt: Any, **options: Any) -> Any:
        del prompt, options
        slow = self

        class Stream:
            answer: Any = type("A", (), {"usage": {}, "finish_reason": "stop"})()

            def __enter__(self) -> Any:
                slow._now += 1
                slow.most = max(slow.most, slow._now)
                return self

            def __exit__(self, *_: Any) -> None:
                slow._now -= 1

            def __iter__(self) -> Iterator[str]:
                with slow._lock:
                    time.sleep(slow._seconds)
                    yield "x"

        return Stream()


def test_the_open_loop_counts_from_when_it_was_due() -> None:
    """Requests every 20 ms to a server that takes 100 ms: the last one waits for all others."""
    asked = [Asked((1,), 1, 0, 0.02 * index) for index in range(5)]
    slow = Slow(0.1)
    found = Load(slow, config().traffic).open(asked)  # type: ignore[arg-type]
    firsts = sorted(one.first or 0 for one in found)
    for first, expected in zip(firsts, (0.1, 0.18, 0.26, 0.34, 0.42), strict=True):
        assert expected - 0.01 <= first < expected + 1
    assert slow.most > 1


def test_the_closed_loop_has_that_many_clients() -> None:
    asked = [Asked((1,), 1, 0)] * 9
    slow, begun = Slow(0.05), time.monotonic()
    found = Load(slow, config().traffic).closed(asked, 3)  # type: ignore[arg-type]
    elapsed = time.monotonic() - begun
    assert len(found) == 9 and slow.most == 3
    # Each counts from when its client was free: three clients cannot be busy for longer than the
    # whole lasted. Counted from the beginning it would be twice that.
    assert sum(one.whole for one in found) <= 3 * elapsed


def test_faults_of_the_benchmark_itself_are_raised() -> None:
    load = Load(Client("1"), config(extra_body='{"n": 2}').traffic)
    with pytest.raises(ConfigError, match="one answer"):
        load.closed([Asked((1,), 1, 0)] * 3, 2)


def run(given: ServeBenchConfig) -> Any:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a server was given by its URL")

    return bench_serve(given, Reporter(quiet=True), start=never, stop=never)


def test_a_real_server(
    make_engine: Callable[..., TorchEngine], serve: Callable[..., str], tmp_path: Path
) -> None:
    app = create_app(make_engine(max_batch_size=2), settings())
    output = tmp_path / "serve.json"
    given = config(serve(app), concurrency=[1, 3], rate=[50.0], output=str(output))
    report = run(given)
    assert [point.name for point in report.points] == ["1 clients", "3 clients", "50 requests/s"]
    for point in report.points:
        assert point.answered == 6 and not point.errors
        assert point.prompt_tokens == 6 * 4 and point.new_tokens <= 6 * 5
        assert point.first and point.whole and point.first.p50 <= point.whole.p50
    # The server counted the same tokens: three points and a request before them.
    text = app.test_client().get("/metrics").get_data(as_text=True)
    (line,) = [x for x in text.splitlines() if "prompt_tokens_total " in x and x[0] != "#"]
    counted = float(line.split()[1])
    assert counted == (3 * 6 + 1) * 4
    written = json.loads(output.read_text())
    assert written["config_digest"] and written["lineage"] == "d" and "commit" in written
    assert written["model"] == {"name": "tiny", "context": 96}
    assert [point["mode"] for point in written["points"]] == ["closed", "closed", "open"]
    assert len(written["points"][0]["requests"]) == 6


def test_refusals_are_counted_by_kind(
    make_engine: Callable[..., TorchEngine], serve: Callable[..., str]
) -> None:
    engine = make_engine(max_batch_size=1, max_queue=0)
    url = serve(create_app(engine, settings()))
    report = run(config(url, concurrency=[6], requests=12, new_tokens="60", warmup=0))
    (point,) = report.points
    assert set(point.errors) == {"HTTP 429"} and 1 <= point.answered < 12
    assert point.answered + point.errors["HTTP 429"] == 12


def test_nobody_answers(script: Script) -> None:
    script.answers["/v1/models"] = (200, {"data": [{"id": "m"}]})
    script.answers["/v1/lineage"] = (404, {})
    script.answers["/v1/completions"] = (503, {"error": {"message": "stopping"}})
    with pytest.raises(WorkerError, match="HTTP 503"):
        run(config(script.url, vocab_size=10))


def test_other_servers_count_nothing(script: Script) -> None:
    script.answers["/v1/models"] = (200, {"data": [{"id": "m"}]})
    script.answers["/v1/lineage"] = (404, b"")
    chunks = [{"choices": [{"text": text}]} for text in ("a", "", "b")]
    script.stream("/v1/completions", *chunks)
    report = run(config(script.url, vocab_size=10, concurrency=[2], extra_body='{"x": 1}'))
    assert report.points[0].new_tokens == 6 * 2 and report.lineage is None
    bodies = [body for path, body, _ in script.seen if path == "/v1/completions"]
    assert all(body["x"] == 1 and max(body["prompt"]) < 10 for body in bodies)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--load MODEL or --url"),
        (["--load", "a", "--url", "b"], "--load MODEL or --url"),
        (["--url", "a", "--serve-args", "--dtype bf16"], "needs --load"),
        (["--load", "a", "--serve-args", "--port 5"], "said by the benchmark itself"),
        (["--url", "a", "--concurrency", "0", "--rate", "-1"], "2 problems"),
        (["--url", "a", "--extra-body", "[1]"], "JSON object"),
        (["--url", "a", "--extra-body", "{"], "not JSON"),
        (["--url", "a", "--chart", "a.pdf"], ".png"),
        (["--load", "/nowhere"], "exit code 4"),
    ],
)
def test_bad_options(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", *options]) == (4 if "/nowhere" in options else 2)
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_a_server_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_native(tmp_path / "demo", gpt2_config(max_position_embeddings=128))
    shared = ["bench", "serve", "--load", str(model), "--serve-args", "--max-batch-size 2"]
    small = ["--requests", "4", "--prompt-tokens", "8", "--new-tokens", "4-8", "--concurrency", "2"]
    chart, output = tmp_path / "a" / "serve.png", tmp_path / "serve.json"
    files = ["--chart", str(chart), "--output", str(output)]
    assert main([*shared, *small, "--rate", "20", *files]) == 0
    assert "2 clients" in capsys.readouterr().out
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert json.loads(output.read_text())["model"]["name"] == "demo"
