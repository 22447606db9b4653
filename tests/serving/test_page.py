"""The page at ``/`` in a real browser: answers, probabilities, figures, errors, keys, policy."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from serving.app import create_app
from serving.chat_prompt import open_chat
from serving.torch_engine import TorchEngine
from tests.serving.conftest import settings
from tests.serving.faults import slow_ticks
from tests.serving.models import ByteTokenizer, greedy_without_cache, tiny_model
from tests.serving.wire import eventually

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.slow
MakeEngine = Callable[..., TorchEngine]
Serve = Callable[..., str]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
EVIL = '<img src=x onerror="document.title=1">'


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"none of {', '.join(NAMES)} is on this machine")
    with playwright.sync_playwright() as driver:
        # Without its sandbox, which root cannot have; it only sees pages of this test.
        running = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        running.close()


class Visit:
    """A page and all that it complained about. asked: addresses that it sent requests to."""

    def __init__(self, browser: Any, **context: Any) -> None:
        self.page = browser.new_context(**context).new_page()
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def expect(self, selector: str) -> Any:
        return playwright.expect(self.page.locator(selector))

    def fill(self, **values: object) -> None:
        for name, value in values.items():
            self.page.fill(f"#{name}", str(value))


@pytest.fixture
def engine(make_engine: MakeEngine) -> TorchEngine:
    return make_engine()


@pytest.fixture
def url(engine: TorchEngine, serve: Serve) -> str:
    return serve(create_app(engine, settings(chat=open_chat("plain", ByteTokenizer(), "tiny"))))


@pytest.fixture
def visit(browser: Any, url: str) -> Iterator[Visit]:
    found = Visit(browser)
    found.page.goto(url)
    found.expect("#model").to_have_text("tiny")
    yield found
    assert found.complaints == []
    assert {address.split("/")[2] for address in found.asked} == {url.split("/")[2]}
    found.page.context.close()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    slow_ticks(monkeypatch, 0.05)


def test_a_text_is_continued(visit: Visit) -> None:
    visit.fill(prompt="Hello", max_tokens=20, temperature=0)
    visit.page.press("#prompt", "Control+Enter")
    visit.expect("#status").to_contain_text("20 tokens in")
    ids = greedy_without_cache(tiny_model(), b"Hello", 20)
    shown = visit.page.locator("#answer").evaluate("box => box.textContent")
    assert shown == "Hello" + ByteTokenizer().decode(ids)


def test_a_token_shows_its_alternatives(visit: Visit) -> None:
    visit.fill(prompt="Hello", max_tokens=12, temperature=0)
    visit.page.click("#send")
    visit.expect("#status").to_contain_text("12 tokens in")
    visit.page.locator("#answer .token").first.dispatch_event("pointerover")
    visit.expect("#alternatives").to_be_visible()
    rows = visit.page.locator("#rows tr")
    assert rows.count() >= 4
    first = rows.first.locator("td").all_inner_texts()
    # Greedy: the token itself is the likeliest, and its share is that of the model.
    chosen = visit.page.inner_text("#chosen")
    assert first[1] in chosen
    ids = torch.tensor([list(b"Hello")])
    share = tiny_model()(ids)[0, -1].softmax(-1).max().item()
    assert f"{100 * share:.1f} %" in chosen


def test_chat_remembers(visit: Visit, engine: TorchEngine) -> None:
    visit.page.check("input[value=chat]")
    visit.fill(prompt="Hi", max_tokens=4, temperature=0, stop="\\n")
    visit.page.click("#send")
    visit.expect("#status").to_contain_text("tokens in")
    visit.expect("#prompt").to_have_value("")
    visit.fill(prompt="More")
    with visit.page.expect_request("**/v1/chat/completions") as caught:
        visit.page.click("#send")
    sent = caught.value.post_data_json
    assert [message["role"] for message in sent["messages"]] == ["user", "assistant", "user"]
    assert sent["stop"] == ["\n"] and sent["stream"] is True
    visit.expect("#status").to_contain_text("tokens in")


def test_errors_are_told_in_the_servers_words(visit: Visit) -> None:
    visit.page.locator("#max_tokens").evaluate("box => box.removeAttribute('max')")
    visit.fill(prompt="Hello", max_tokens=500)
    visit.page.click("#send")
    visit.expect("#status").to_contain_text("maximum context length is 96")
    visit.expect("#send").to_be_enabled()
    # The browser itself tells of the 400.
    assert [c for c in visit.complaints if "400" not in c] == []
    visit.complaints.clear()


def test_what_is_written_is_text(visit: Visit) -> None:
    visit.fill(prompt=EVIL, max_tokens=2)
    visit.page.click("#send")
    visit.expect("#status").to_contain_text("tokens in")
    visit.expect("#answer").to_contain_text(EVIL)
    assert visit.page.locator("#answer img").count() == 0 and "tiny" in visit.page.title()


def test_figures_move(visit: Visit) -> None:
    visit.expect("#light").to_have_class("light good")
    visit.fill(prompt="Hello", max_tokens=60, temperature=0)
    visit.page.click("#send")
    visit.expect("#status").to_contain_text("tokens in")
    visit.expect("#figure-first").to_contain_text("ms", timeout=8000)
    visit.expect("#figure-running").to_have_text("0")


def test_stop_frees_the_server(visit: Visit, engine: TorchEngine, slow: None) -> None:
    visit.fill(prompt="Hello", max_tokens=90, temperature=0)
    visit.page.click("#send")
    visit.expect("#answer .token").not_to_have_count(0)
    assert engine.stats().running == 1
    visit.page.click("#halt")
    visit.expect("#status").to_have_text("Stopped.")
    assert eventually(lambda: engine.stats().running == 0)


def test_a_dead_engine_is_red(visit: Visit, engine: TorchEngine) -> None:
    engine.close(timeout=5)
    visit.expect("#light").to_have_class("light bad", timeout=8000)
    visit.fill(prompt="Hello")
    visit.page.click("#send")
    visit.expect("#status").to_contain_text("stopping")
    assert all("503" in complaint for complaint in visit.complaints)
    visit.complaints.clear()


def test_a_browser_gives_the_key_as_a_password(
    browser: Any, engine: TorchEngine, serve: Serve
) -> None:
    url = serve(create_app(engine, settings(api_keys=frozenset({"s3cret"}))))
    stranger = Visit(browser)
    with pytest.raises(playwright.Error, match="INVALID_AUTH"):
        stranger.page.goto(url)
    owner = Visit(browser, http_credentials={"username": "", "password": "s3cret"})
    assert owner.page.goto(url).status == 200
    owner.expect("#model").to_have_text("tiny")
    owner.fill(prompt="Hello", max_tokens=5)
    owner.page.click("#send")
    owner.expect("#status").to_contain_text("tokens in")
    assert owner.page.locator("input[value=chat]").is_disabled()
