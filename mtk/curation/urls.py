"""URLs that are not worth a download, in the order of OpenWebText's tools: a registered domain
or a file extension of the lists, too short, malformed, seen before.

Two faults of those tools are not repeated: extensions are looked for in the path alone, so
that ``http://site.ai`` is no Illustrator file, and every extension of the list counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mtk.curation.pages import Page, Stretch
from mtk.curation.seen import digests
from mtk.curation.sifting import Judge, Sifted, Verdict, sift
from mtk.errors import ConfigError, DataError

DOMAINS = Path(__file__).with_name("blocked_domains.txt")
EXTENSIONS = Path(__file__).with_name("blocked_extensions.txt")
DOMAIN, EXTENSION = "blocked domain", "blocked extension"
SHORT, MALFORMED, DUPLICATE = "too short", "malformed", "duplicate URL"

_LABEL = r"(?!-)[^\W_](?:[^\W_]|-){0,62}(?<!-)"
_HOST = re.compile(rf"(?:{_LABEL}\.)+(?!\d+\.?$){_LABEL}\.?")
_IPV4 = re.compile(r"(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)(?:\.(?!$)|$)){4}")
# scheme, user and password, host, port, path (with query and fragment)
_PARTS = re.compile(r"(https?)://(?:[^\s/?#@]*@)?([^\s/?#:@]*)(?::(\d{0,5}))?([/?#]\S*)?", re.I)


def read_list(path: str | Path) -> frozenset[str]:
    """The entries of a list: one or several a line, parted by white space, ``#`` begins a
    comment. Raises DataError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a list: {error}.") from error
    lines = (line.partition("#")[0] for line in text.splitlines())
    return frozenset(entry.lower() for line in lines for entry in line.split())


@dataclass(frozen=True)
class UrlPlan:
    """Which URLs are dropped. domains: names under any public suffix ("reddit"), registered
    domains or hosts ("blog.example.org"). extensions: with their dot. as_lines: write the URL
    alone, not its record."""

    key: str
    id_key: str
    domains: frozenset[str]
    extensions: frozenset[str]
    min_length: int
    as_lines: bool

    def open(self) -> Callable[[Stretch], Sifted]:
        judge = url_judge(self)
        return lambda stretch: sift(stretch, self.key, self.id_key, judge)


def url_judge(plan: UrlPlan) -> Judge:
    """Every rule but that of duplicates, which needs all URLs."""
    registered = lru_cache(1 << 16)(_registered_domain())
    extensions = tuple(plan.extensions)

    def judge(page: Page, number: int) -> Verdict:
        del number
        url = page.text.strip()
        parts = _PARTS.fullmatch(url)
        host = parts[2].lower().rstrip(".") if parts else ""
        blocked = _blocked(host, registered, plan.domains)
        if blocked:
            return Verdict(reason=DOMAIN, detail=blocked)
        path = re.split(r"[?#]", parts[4] or "", maxsplit=1)[0].lower() if parts else ""
        if path.endswith(extensions):
            return Verdict(reason=EXTENSION, detail=path.rpartition(".")[2])
        if len(url) < plan.min_length:
            return Verdict(reason=SHORT, detail=f"{len(url)} characters")
        if parts is None or not is_host(host) or int(parts[3] or 0) > 65535:
            return Verdict(reason=MALFORMED, detail=url[:200])
        line = url.encode() if plan.as_lines else page.line()
        return Verdict((line,), digest=int(digests([url])[0]))

    return judge


def is_host(host: str) -> bool:
    """A name with a dot, its last label no number, or an IPv4 address."""
    return bool(_IPV4.fullmatch(host) or (len(host) <= 253 and _HOST.fullmatch(host)))


def _blocked(
    host: str, registered: Callable[[str], str | None], names: frozenset[str]
) -> str | None:
    """The entry that names the host, its registered domain or its first label."""
    domain = registered(host) if "." in host else None
    if domain is None:
        return None
    label = domain.partition(".")[0]
    if label in names or domain in names:
        return label if label in names else domain
    while len(host) > len(domain):
        if host in names:
            return host
        host = host.partition(".")[2]
    return None


def _registered_domain() -> Callable[[str], str | None]:
    """By the public suffix list that comes with the package, of registries only (so that
    ``x.github.io`` belongs to ``github.io``)."""
    try:
        from publicsuffixlist import PublicSuffixList
    except ImportError as error:
        message = "the URL rules need the package publicsuffixlist: pip install 'mtk[curate]'."
        raise ConfigError(message) from error
    suffixes: Any = PublicSuffixList(only_icann=True)

    def registered(host: str) -> str | None:
        if _IPV4.fullmatch(host) or len(host) > 253:
            return None
        found: str | None = suffixes.privatesuffix(host)
        return found

    return registered
