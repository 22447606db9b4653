"""The head of a MediaWiki export: which wiki it is, and what it calls its namespaces.

Format: https://www.mediawiki.org/xml/export-0.11/ (0.3 to 0.11 look alike here).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote
from xml.parsers import expat

from mtk.curation.wikipedia.stream import BrokenStreamError, DumpStream
from mtk.errors import DataError

LARGEST_HEAD = 4 << 20
FILE, CATEGORY = 6, 14
_FIRST_PAGE = re.compile(rb"<page[\s>]|</mediawiki\s*>")
_ID = re.compile(rb"<id>\s*(\d+)\s*</id>")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Site:
    """A wiki as its dump describes it.

    base: address of pages, up to the title. namespaces: (number, name as it is written in
    titles). head_bytes: where the first page, or the end of the dump, stands. first_page: its
    number in the wiki, "" if it cannot be told.
    """

    name: str = ""
    language: str = ""
    base: str = ""
    namespaces: tuple[tuple[int, str], ...] = ()
    head_bytes: int = 0
    first_page: str = ""

    def url(self, title: str) -> str:
        """The page's address, with the characters that MediaWiki leaves as they are."""
        return self.base + quote(title.replace(" ", "_"), safe=";@$!*(),/~:")

    def namespace_of(self, title: str) -> int:
        """For dumps that do not say it: by the title's beginning."""
        prefix, colon, _ = title.partition(":")
        wanted = prefix.replace("_", " ").strip().casefold()
        if colon and wanted:
            for number, name in self.namespaces:
                if name.casefold() == wanted:
                    return number
        return 0

    def names_of(self, number: int) -> tuple[str, ...]:
        return tuple(name for found, name in self.namespaces if found == number)


def read_site(path: Path) -> Site:
    """Raises DataError for what is not a MediaWiki export, or declares a document type."""
    with DumpStream(path) as stream:
        head = bytearray()
        try:
            while (first := _FIRST_PAGE.search(head)) is None or not _ID.search(
                head, first.start()
            ):
                if len(head) >= LARGEST_HEAD:
                    break
                data = stream.read()
                if not data:
                    break
                head += data
        except BrokenStreamError as error:
            raise DataError(
                f"{path}, before page 1 (byte {len(head)} uncompressed): the stream is broken: "
                f"{error}. Restore the file."
            ) from error
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} is encoded in UTF-16; dumps are UTF-8. Convert it.")
    parser = _HeadParser(path)
    parser.parse(bytes(head if first is None else head[: first.start()]))
    if first is None:
        raise DataError(
            f"{path}: no <page> and no end of the dump in its first {len(head):,} bytes: it is cut "
            f"short, or not a dump of pages. Restore the file."
        )
    number = _ID.search(head, first.start())
    return parser.site(first.start(), number[1].decode() if number else "")


@dataclass
class _HeadParser:
    path: Path
    language: str = ""
    names: dict[str, str] = field(default_factory=dict)
    spaces: list[tuple[int, str]] = field(default_factory=list)
    _inside: list[str] = field(default_factory=list)
    _key: str = ""
    _text: str = ""

    def parse(self, head: bytes) -> None:
        parser = expat.ParserCreate()
        parser.buffer_text = True
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._characters
        parser.StartDoctypeDeclHandler = self._doctype
        parser.XmlDeclHandler = self._declaration
        try:
            parser.Parse(head.removeprefix(_BOM), False)
        except expat.ExpatError as error:
            raise DataError(
                f"{self.path}, before page 1 (byte {parser.ErrorByteIndex} uncompressed): not "
                f"XML: {error}. --input takes MediaWiki dumps (pages-articles.xml, also .bz2)."
            ) from error
        if not self.names and not self._inside:
            self._not_a_dump("no element")

    def site(self, head_bytes: int, first_page: str) -> Site:
        base = self.names.get("base", "")
        return Site(
            name=self.names.get("dbname") or self.names.get("sitename", ""),
            language=self.language,
            base=base[: base.rfind("/") + 1],
            namespaces=tuple(self.spaces),
            head_bytes=head_bytes,
            first_page=first_page,
        )

    def _start(self, name: str, attributes: dict[str, Any]) -> None:
        if not self._inside:
            if name != "mediawiki":
                self._not_a_dump(f"<{name}>")
            self.language = attributes.get("xml:lang", "")
        self._inside.append(name)
        self._key, self._text = attributes.get("key", ""), ""

    def _characters(self, text: str) -> None:
        self._text += text

    def _end(self, name: str) -> None:
        self._inside.pop()
        if name == "namespace" and self._key.lstrip("-").isdigit():
            self.spaces.append((int(self._key), self._text.strip()))
        elif name in ("sitename", "dbname", "base"):
            self.names[name] = self._text.strip()

    def _doctype(self, *declaration: object) -> NoReturn:
        raise DataError(
            f"{self.path} declares a document type ({declaration[0]}). No MediaWiki dump has one, "
            f"and entities declared there could fill the memory: it is refused."
        )

    def _declaration(self, version: str, encoding: str | None, standalone: int) -> None:
        del version, standalone
        if encoding is not None and encoding.lower() not in ("utf-8", "utf8", "us-ascii"):
            raise DataError(f"{self.path} is encoded in {encoding}; dumps are UTF-8. Convert it.")

    def _not_a_dump(self, found: str) -> NoReturn:
        raise DataError(
            f"{self.path} is not a MediaWiki export: it begins with {found}, not <mediawiki>. "
            f"--input takes pages-articles.xml, also packed (.bz2 .gz .zst)."
        )
