"""MediaWiki exports made up for tests, some of them from real prose with planted markup."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from xml.sax.saxutils import escape

from mtk.data.demo_corpus import Document, demo_documents

NAMESPACES = {
    -2: "Media",
    -1: "Special",
    0: "",
    1: "Talk",
    2: "User",
    4: "Wikipedia",
    6: "File",
    10: "Template",
    14: "Category",
}
GERMAN = {**NAMESPACES, 6: "Datei", 10: "Vorlage", 14: "Kategorie", 1: "Diskussion"}


@dataclass
class Page:
    title: str
    text: str
    ns: int | None = 0
    redirect: str | None = None
    model: str = "wikitext"

    def xml(self, number: int) -> str:
        ns = "" if self.ns is None else f"<ns>{self.ns}</ns>"
        redirect = f'<redirect title="{escape(self.redirect)}" />' if self.redirect else ""
        return (
            f"  <page>\n    <title>{escape(self.title)}</title>\n    {ns}\n    <id>{number}</id>\n"
            f"    {redirect}\n    <revision>\n      <id>{number + 10_000}</id>\n"
            f"      <timestamp>2024-01-{number % 28 + 1:02}T00:00:00Z</timestamp>\n"
            f"      <contributor><username>A &amp; B</username><id>7</id></contributor>\n"
            f"      <model>{self.model}</model>\n      <format>text/x-wiki</format>\n"
            f'      <text bytes="1" xml:space="preserve">{escape(self.text)}</text>\n'
            f"      <sha1>x</sha1>\n    </revision>\n  </page>\n"
        )


def head(language: str = "en") -> str:
    spaces = GERMAN if language == "de" else NAMESPACES
    listed = "".join(
        f'<namespace key="{key}" case="first-letter">{name}</namespace>'
        for key, name in spaces.items()
    )
    return (
        '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" '
        f'xml:lang="{language}">\n  <siteinfo><sitename>Wikipedia</sitename>'
        f"<dbname>{language}wiki</dbname>"
        f"<base>https://{language}.wikipedia.org/wiki/Main_Page</base>"
        f"<generator>test</generator><case>first-letter</case>"
        f"<namespaces>{listed}</namespaces></siteinfo>\n"
    )


TAIL = "</mediawiki>\n"


def dump(pages: Iterable[Page], language: str = "en", first: int = 1) -> bytes:
    body = "".join(page.xml(number) for number, page in enumerate(pages, start=first))
    return (head(language) + body + TAIL).encode()


@dataclass
class Planted:
    """pages, and of each title what must come out: why it is dropped, or its words.

    gone: by kind of markup, words that stand in it and must not come out.
    """

    pages: list[Page] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    words: dict[str, list[str]] = field(default_factory=dict)
    gone: dict[str, list[str]] = field(default_factory=dict)
    kept: dict[str, list[str]] = field(default_factory=dict)


# What must vanish: {w} is a word that may not come out. Between paragraphs or in a sentence.
GONE_BLOCKS = {
    "template": "{{{{Infobox thing\n| name = {w}\n| a = {{{{small|{w}}}}} {{{{flag|{w}}}}}\n"
    "| b = {{{{unbulleted list|{w}|[[{w}|{w}]]}}}}\n}}}}",
    "hatnote": "{{{{Main|{w}}}}}",
    "table": "{{| class=\"wikitable\"\n|+ {w}\n! {w} !! {w}\n|-\n| [[{w}]] || ''{w}''\n|-\n"
    "|\n{{|\n| {w}\n|}}\n|}}",
    "html table": "<table><tr><td>{w}<table><tr><td>{w}</td></tr></table></td></tr></table>",
    "comment": "<!-- {w}\n\n== {w} == {{{{ [[ -->",
    "file": "[[File:{w}.jpg|thumb|200px|A [[{w}|{w}]] and [http://example.org/{w} {w}] {w}]]",
    "image": "[[image: {w}.png |left|{w}]]",
    "gallery": "<gallery mode=packed>\nFile:{w}.jpg|{w} [[{w}]]\n</gallery>",
    "category": "[[Category:{w}|{w}]]",
    "language": "[[de:{w}]]\n[[zh-min-nan:{w}]]",
    "formula": "<math>\\frac{{{w}}}{{2}}</math>",
    "code": '<syntaxhighlight lang="c">\nint {w} = {{{{1}}}};\n</syntaxhighlight>',
    "timeline": "<timeline>\n{w}\n</timeline>",
    "section": "== References ==\n{w}\n=== {w} ===\n* {w}\n==Return==",
    "section with gap": "==  See also  ==\n* [[{w}]]\n==Return==",
    "empty section": "== {w} ==\n{{{{empty section}}}}\n==Return==",
    "sort key": "{{{{DEFAULTSORT:{w}, {w}}}}}",
    "include only": "<includeonly>{w}</includeonly>",
}
GONE_INLINE = {
    "reference": '<ref name="{w}" group=a>{{{{cite|url=http://x.org/{w}|title={w}}}}} {w}</ref>',
    "reference by name": '<ref name="{w}" />',
    "reference template": "{{{{sfn|{w}|2001|p=1}}}}",
    "wanted": "{{{{citation needed|date={w}}}}}",
    "inline comment": "<!--{w}-->",
    "pronunciation": " ({{{{IPAc-en|{w}}}}})",
    "hidden": '<span style="display:none">{w}</span>',
    "bare link": " [http://example.org/{w}]",
    "style": '<templatestyles src="{w}.css" />',
    "coordinates": "{{{{coord|1|{w}|N|display=title}}}}",
}
# What must stay: {w} is a word that has to come out exactly once.
KEPT_INLINE = {
    "link": " [[{w}]]",
    "link with text": " [[Some target#at|{w}]]",
    "pipe trick": " [[Help:{w} (thing)|]]",
    "trailing letters": " [[{a}]]{b}",
    "colon link": " [[:{w}]]",
    "bold": " '''{w}'''",
    "italics": " ''{w}''",
    "bold italics": " '''''{w}'''''",
    "external link": " [https://example.org/a?b=c {w}]",
    "tag": ' <span class="x">{w}</span>',
    "entity": " &quot;{w}&quot;&nbsp;&mdash;",
    "shown": " <nowiki>[[{w}]]</nowiki>",
    "language template": " {{{{lang|fr|''{w}''}}}}",
    "language prefix": " {{{{lang-de|{w}}}}}",
    "no break": " {{{{nowrap|{{{{small|{w}}}}}}}}}",
    "formatted": " {{{{formatnum:{w}}}}}",
}
KEPT_BLOCKS = {
    "list": "* {w}",
    "numbered list": "## {w}",
    "indented": ":: {w}",
    "definition": "; {w}",
    "heading": "== {w} ==\nReturn",
    "quotation": "{{{{quote|{w}}}}}",
    "break": "<br />{w}<br/>",
    "rule": "---- {w}",
    "div": '<div style="a">{w}</div>',
}
DISAMBIGUATIONS = (
    "{{disambiguation}}",
    "{{Disambig|geo}}",
    "{{hndis|name=X}}",
    "{{ geodis }}",
    "{{disambiguation page\n|surname}}",
    "__DISAMBIG__",
    "{{Letter-Number_Combination Disambiguation}}",
    "{{dab}}<!-- a -->",
)
REDIRECTIONS = ("#REDIRECT [[A]]", "#redirect: [[A|b]] {{R from move}}", "#Weiterleitung [[A]]")


def planted(seed: int = 1) -> Planted:
    """The demo corpus as articles with all of the above strewn in, and pages to be dropped."""
    out = Planted()
    chance = random.Random(seed)
    for number, document in enumerate(prose()):
        _article(out, document, number, chance)
        if number % 9 == 0:
            _dropped(out, number, chance)
    return out


def _dropped(out: Planted, number: int, chance: random.Random) -> None:
    kinds = {
        "redirect": Page(f"R{number}", "#Uelekezi [[A & <B>]]", redirect="A & <B>"),
        "redirect without tag": Page(f"O{number}", chance.choice(REDIRECTIONS)),
        "disambiguation": Page(
            f"D{number}", f"'''D''' may be:\n* [[A]]\n\n{chance.choice(DISAMBIGUATIONS)}"
        ),
        "disambiguation by title": Page(f"D{number} (disambiguation)", "* [[A]]\n* [[B]]"),
        "namespace": Page(f"Talk:T{number}", "Is this right?", ns=1),
        "namespace by title": Page(f"Template:T{number}", "{{{1}}} text", ns=None),
        "not wikitext": Page(f"J{number}.json", "{}", model="json"),
        "empty": Page(f"E{number}", "{{Infobox|a=b}}\n<!-- nothing -->\n[[Category:X]]"),
        "list": Page(f"List of {number}", "* [[A]] is on a list"),
    }
    for kind, page in kinds.items():
        out.pages.append(page)
        out.reasons[page.title] = re.sub(" (by|without) .*", "", kind)


def _article(out: Planted, document: Document, number: int, chance: random.Random) -> None:
    title = f"A{number} {document.source.rpartition(':')[2]}"
    words = re.findall(r"\w+", document.text)
    pieces: list[str] = []
    for paragraph in document.text.split("\n\n"):
        pieces.append(_as_wikitext(paragraph) + _inline(out, words, chance))
        if chance.random() < 0.6:
            pieces.append(_block(out, words, chance))
    # Talks about disambiguation, but is none.
    pieces.append("See<!-- {{disambig}} --><nowiki/>{{disambiguation needed|date=a}} on.")
    words += ["See", "on"]
    out.pages.append(Page(title, "\n\n".join(pieces)))
    out.words[title] = words


def _inline(out: Planted, words: list[str], chance: random.Random) -> str:
    found = ""
    for _ in range(chance.randrange(3)):
        kind = chance.choice([*GONE_INLINE, *KEPT_INLINE])
        if kind in GONE_INLINE:
            found += GONE_INLINE[kind].format(w=_word(out.gone, kind))
            continue
        word = _word(out.kept, kind)
        words.append(word)
        found += KEPT_INLINE[kind].format(w=word, a=word[:4], b=word[4:])
    return found


def _block(out: Planted, words: list[str], chance: random.Random) -> str:
    kind = chance.choice([*GONE_BLOCKS, *KEPT_BLOCKS])
    if kind in GONE_BLOCKS:
        text = GONE_BLOCKS[kind].format(w=_word(out.gone, kind))
        if text.endswith("==Return=="):
            words.append("Return")
            text += "\nback"
            words.append("back")
        return text
    word = _word(out.kept, kind)
    words += [word, "Return"] if kind == "heading" else [word]
    return KEPT_BLOCKS[kind].format(w=word)


def _word(listed: dict[str, list[str]], kind: str) -> str:
    words = listed.setdefault(kind, [])
    words.append(f"x{kind.replace(' ', '')}x{len(words)}q")
    return words[-1]


@lru_cache(maxsize=1)
def prose() -> list[Document]:
    return demo_documents()


_MARKUP = {ord(c): f"&#{ord(c)};" for c in "[]{}|'<>&=*#:;_~!-"}


def _as_wikitext(paragraph: str) -> str:
    """Prose as an editor would have to write it: nothing in it acts as markup."""
    return "\n".join(line.strip().translate(_MARKUP) for line in paragraph.split("\n"))


def many_pages(count: int) -> Iterator[Page]:
    """Articles of a few kilobytes with redirects between them."""
    documents = prose()
    for number in range(count):
        document = documents[number % len(documents)]
        if number % 3 == 2:
            yield Page(f"R{number}", "#REDIRECT [[A]]", redirect="A")
        else:
            text = f"{{{{Infobox|a=b}}}}\n'''Page {number}''' {_as_wikitext(document.text)}"
            yield Page(f"Page {number}", text)
