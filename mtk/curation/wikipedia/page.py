"""The XML of one page to its fields, by expat: no tree, no entities of the page's own."""

from __future__ import annotations

from dataclasses import dataclass
from xml.parsers import expat

_FIELDS = {
    ("page", "title"): "title",
    ("page", "ns"): "ns",
    ("page", "id"): "id",
    ("page", "revision", "id"): "revision",
    ("page", "revision", "timestamp"): "timestamp",
    ("page", "revision", "model"): "model",
    ("page", "revision", "text"): "text",
}


@dataclass
class Page:
    """As the dump has it; of several revisions the last. ns is "" in dumps before 2012."""

    title: str = ""
    ns: str = ""
    id: str = ""
    revision: str = ""
    timestamp: str = ""
    model: str = "wikitext"
    text: str = ""
    redirect: bool = False


class PageError(Exception):
    """A page that cannot be used. reason: a short constant to count by; byte: inside it; page:
    as far as it was read."""

    def __init__(self, reason: str, detail: str, page: Page, byte: int = 0) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.page, self.byte = reason, detail, page, byte


def parse_page(xml: bytes) -> Page:
    """Raises PageError for malformed XML, and for a page without title or number."""
    page = Page()
    path: list[str] = []
    pieces: list[str] = []

    def start(name: str, attributes: dict[str, str]) -> None:
        del attributes
        path.append(name)
        pieces.clear()
        if name == "redirect" and len(path) == 2:
            page.redirect = True

    def end(name: str) -> None:
        del name
        field = _FIELDS.get(tuple(path))
        if field is not None:
            setattr(page, field, "".join(pieces))
        path.pop()

    parser = expat.ParserCreate("utf-8")
    parser.buffer_text = True
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = pieces.append
    try:
        parser.Parse(xml, True)
    except expat.ExpatError as error:
        reason = expat.ErrorString(error.code)
        raise PageError("malformed XML", reason, page, parser.ErrorByteIndex) from None
    page.title = page.title.strip()
    for name, value in (("title", page.title), ("id", page.id)):
        if not value:
            raise PageError(f"no {name}", f"the page has no <{name}>", page)
    return page
