"""URLs: every rule, the lists, duplicates, files of bare URLs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtk.config import make
from mtk.config.curate_web import CurateUrlsConfig
from mtk.curation.pages import Page
from mtk.curation.seen import Seen, digests
from mtk.curation.urls import DOMAINS, EXTENSIONS, UrlPlan, is_host, read_list, url_judge
from mtk.errors import ConfigError, DataError
from stages.curate_web import run_urls
from tests.curation.inputs import QUIET, read_lines, write_lines

GOOD = (
    "http://example.org",
    "https://example.org/a/b?c=d&e=f#g",
    "http://www.example.co.uk:8080/x",
    "http://127.0.0.1/page",
    "HTTP://Example.ORG/Page",
    "http://user:secret@example.org/a",
    "http://bücher.example.org/ä",
    "http://xn--bcher-kva.example.org/",
    "http://site.ai",
    "http://site.py/",
    "http://example.org/?file=a.pdf",
    "http://example.org/page#a.zip",
    "http://example.org./a",
    "http://notfacebook.com/a",
    "http://facebook.example.org/a",
    "http://x.org/y",
    "http://apple.com/story",
    "http://example.org/a.pdf/more",
)
BAD = {
    "http://facebook.com/a": ("blocked domain", "facebook"),
    "http://m.facebook.com:80/a": ("blocked domain", "facebook"),
    "http://www.amazon.co.uk/a": ("blocked domain", "amazon"),
    "http://en.wikipedia.org/wiki/A": ("blocked domain", "wikipedia"),
    "https://apps.apple.com/app": ("blocked domain", "apps.apple.com"),
    "http://x.com/status": ("blocked domain", "x.com"),
    "http://youtu.be/a.pdf": ("blocked domain", "youtu.be"),
    "http://example.org/a.pdf": ("blocked extension", "pdf"),
    "http://example.org/A.PDF?page=2": ("blocked extension", "pdf"),
    "http://example.org/a.7z": ("blocked extension", "7z"),
    "http://example.org/a.ai": ("blocked extension", "ai"),
    "http://a": ("too short", "8 characters"),
    "": ("too short", "0 characters"),
    "http://localhost/a": ("malformed", "http://localhost/a"),
    "ftp://example.org/": ("malformed", "ftp://example.org/"),
    "example.org/a/b": ("malformed", "example.org/a/b"),
    "http://exa mple.org/": ("malformed", "http://exa mple.org/"),
    "http://example.org/a b": ("malformed", "http://example.org/a b"),
    "http://256.1.1.1/a": ("malformed", "http://256.1.1.1/a"),
    "http://1.2.3/abc": ("malformed", "http://1.2.3/abc"),
    "http://example.org:99999/": ("malformed", "http://example.org:99999/"),
    "http://-a.example.org/": ("malformed", "http://-a.example.org/"),
    "http://a..example.org/": ("malformed", "http://a..example.org/"),
    "http://[::1]/abcdef": ("malformed", "http://[::1]/abcdef"),
    f"http://{'a' * 64}.org/": ("malformed", f"http://{'a' * 64}.org/"),
}


def plan(**values: Any) -> UrlPlan:
    defaults = {
        "key": "url",
        "id_key": "url",
        "domains": read_list(DOMAINS),
        "extensions": read_list(EXTENSIONS),
        "min_length": 9,
        "as_lines": False,
    }
    return UrlPlan(**(defaults | values))


def judged(url: str, **values: Any) -> tuple[str, str]:
    verdict = url_judge(plan(**values))(Page(b"{}", False, "url", url), 1)
    assert bool(verdict.lines) != bool(verdict.reason)
    return verdict.reason, verdict.detail


@pytest.mark.parametrize("url", GOOD)
def test_good_urls(url: str) -> None:
    assert judged(url) == ("", "")


@pytest.mark.parametrize("url", BAD)
def test_bad_urls(url: str) -> None:
    assert judged(url) == BAD[url]


def test_every_extension_of_the_list_counts() -> None:
    """A missing comma once made two of them useless."""
    extensions = read_list(EXTENSIONS)
    assert len(extensions) >= 66 and all(end.startswith(".") for end in extensions)
    judge = url_judge(plan())
    for end in extensions:
        page = Page(b"{}", False, "url", f"http://example.org/file{end}")
        assert judge(page, 1).reason == "blocked extension", end


def test_every_site_of_the_list_counts() -> None:
    names = read_list(DOMAINS)
    assert len(names) >= 111
    judge = url_judge(plan())
    for name in names:
        url = f"http://{name}/p" if "." in name else f"http://www.{name}.com/p"
        assert judge(Page(b"{}", False, "url", url), 1).reason == "blocked domain", name


@pytest.mark.parametrize(
    ("host", "good"),
    [
        ("a.b", True),
        ("a-b.c-d.ef", True),
        ("a.b1", True),
        ("1.2.3.4", True),
        ("255.255.255.255", True),
        ("1.2.3.4.5", False),
        ("a.12", False),
        ("a_b.org", False),
        ("a-.org", False),
        (f"{'a.' * 127}org", False),
        ("", False),
    ],
)
def test_hosts(host: str, good: bool) -> None:
    assert is_host(host) == good


def config(folder: Path, source: Path, output: str = "out.jsonl", **more: Any) -> CurateUrlsConfig:
    values = {"input": [str(source)], "output": str(folder / output), "workers": 1}
    return make(CurateUrlsConfig, **(values | more))


def test_bare_urls_in_and_out(tmp_path: Path) -> None:
    lines = [
        "http://b.org/1",
        "",
        "http://a.org/1",
        "http://b.org/1",
        "http://t.co/x",
        " http://a.org/1 ",
    ]
    (tmp_path / "urls.txt").write_text("\n".join(lines) + "\n")
    artifact = run_urls(config(tmp_path, tmp_path / "urls.txt", "out.txt"), QUIET)
    assert (tmp_path / "out.txt").read_text() == "http://b.org/1\nhttp://a.org/1\n"
    assert artifact.metrics["dropped_by_reason"] == {"blocked domain": 1, "duplicate URL": 2}
    run_urls(config(tmp_path, tmp_path / "urls.txt", "records.jsonl"), QUIET)
    found = read_lines(tmp_path / "records.jsonl")
    assert found == [{"url": "http://b.org/1"}, {"url": "http://a.org/1"}]


def test_own_lists(tmp_path: Path) -> None:
    urls = [
        "http://reddit.com/a",
        "http://news.example.org/b",
        "http://good.org/c.pdf",
        "http://www.good.org/d",
    ]
    source = write_lines(tmp_path / "in.jsonl", [{"url": url} for url in urls])

    def kept(name: str, **more: Any) -> list[str]:
        run_urls(config(tmp_path, source, name, **more), QUIET)
        return [record["url"][-1] for record in read_lines(tmp_path / name)]

    assert kept("1.jsonl") == ["b", "d"]
    assert kept("2.jsonl", allow_domains=["reddit"]) == ["a", "b", "d"]
    assert kept("3.jsonl", block_domains=["News.Example.org"]) == ["d"]
    assert kept("4.jsonl", block_domains=["good"]) == ["b"]
    (tmp_path / "domains.txt").write_text("# mine\ngood.org  # all of it\n")
    assert kept("5.jsonl", domain_list=str(tmp_path / "domains.txt")) == ["a", "b"]
    (tmp_path / "ends.txt").write_text("doc\n.PDF\n")
    assert kept("6.jsonl", extension_list=str(tmp_path / "ends.txt")) == ["b", "d"]
    (tmp_path / "ends.txt").write_text("")
    assert kept("7.jsonl", extension_list=str(tmp_path / "ends.txt")) == ["b", "f", "d"]
    with pytest.raises(ConfigError, match="Did you mean reddit"):
        kept("8.jsonl", allow_domains=["redit"])
    with pytest.raises(DataError, match="does not exist"):
        kept("9.jsonl", domain_list=str(tmp_path / "none.txt"))


def test_seen_is_a_set() -> None:
    chance = random.Random(3)
    seen, plain, order = Seen(), set[str](), []
    for _ in range(60):
        batch = [f"u{chance.randrange(4000)}" for _ in range(chance.randrange(200))]
        order.append([text not in plain and not plain.add(text) for text in batch])  # type: ignore[func-returns-value]
        found = seen.add(digests(batch))
        assert found.tolist() == order[-1]
    assert len(seen) == len(plain)
    assert len(seen._runs) <= np.log2(len(plain)) + 1
    assert seen.add(digests([])).tolist() == []
