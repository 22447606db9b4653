"""Wikitext case by case: what MediaWiki shows, in plain text."""

from __future__ import annotations

import time
from typing import Any

import pytest

from mtk.curation.wikipedia.links import link_rules
from mtk.curation.wikipedia.site import Site
from mtk.curation.wikipedia.text import TextRules, plain_text
from mtk.curation.wikipedia.words import words_of

GERMAN = Site(language="de", namespaces=((6, "Datei"), (14, "Kategorie"), (12, "Hilfe")))


def clean(text: str, language: str = "en", title: str = "Title", **rules: Any) -> str:
    site = GERMAN if language == "de" else Site(language=language)
    sections = frozenset(words_of(language).sections)
    given = {"language": language, "dropped_sections": sections, **rules}
    return plain_text(text, title, TextRules(link_rules(site), **given))


CASES = {
    # Links
    "[[a]]": "a",
    "[[a|b]]c": "bc",
    "[[cat]]s": "cats",
    "[[a|b|c]]": "b|c",
    "[[A b#C d]]": "A b#C d",
    "[[a_b]]": "a b",
    "[[Mercury (planet)|]]": "Mercury",
    "[[Boston, Massachusetts|]]": "Boston",
    "[[Help:Links (x)|]]": "Links",
    "[[:Category:Foo]] x": "Category:Foo x",
    "[[:File:a.jpg|the picture]]": "the picture",
    "[[Category:Foo|*]]x": "x",
    "x\n[[fr:Foo]]\n[[zh-yue:Bar]]": "x",
    "[[:fr:Foo|in French]]": "in French",
    "[[wikt:foo|foo]]": "foo",
    "[[Star Trek: Voyager]]": "Star Trek: Voyager",
    "[[File:a.jpg|thumb|[[x|y]] and [[z]] {{small|q}}]]t": "t",
    "[[Image:a b.png|left]] t": "t",
    "[[file:a.jpg|thumb|see [http://x.org y]]] t": "t",
    "a [[File:x.jpg]] b": "a b",
    "a [[b": "a b",
    "a[b[0]]": "a[b[0]]",
    "[[a]] ]] b": "a ]] b",
    "a [[b\n\nc|d]] e": "a b\n\nc|d e",
    "[[File:a.jpg|thumb|b\n\nc]]d": "d",
    "[[File:a.jpg|thumb|b\n== C ==\nd]]": "File:a.jpg|thumb|b\n\nC\n\nd",
    "[[a|]]": "a",
    # External links
    "[http://x.org/a_b?c=d]": "",
    "see [http://x.org].": "see.",
    "[http://x.org the ''site'']": "the site",
    "[https://x.org [[a|b]] c]": "b c",
    "[//x.org y]": "y",
    "[mailto:a@b.c write]": "write",
    "http://x.org/a_b": "http://x.org/a_b",
    "a [sic] b": "a [sic] b",
    # Bold and italics
    "'''b''' ''i'' '''''bi'''''": "b i bi",
    "l'''amour''": "l'amour",
    "l''''Iliade''' x": "l'Iliade x",
    "rock 'n' roll": "rock 'n' roll",
    "''''''x''''''": "'x'",
    "'''b\nnext''": "b\nnext",
    # Templates
    "a {{b}} c": "a c",
    "a{{b}}.": "a.",
    "a {{b}}, c": "a, c",
    "a, {{b}}, {{c}}; d": "a, d",
    "A ({{IPA|x}}; born 1879) b": "A (born 1879) b",
    "A ({{IPA|x}}) b": "A b",
    "A ({{IPA|x}}, {{respell|x}}) b": "A b",
    "A (b; {{IPA|x}}) c": "A (b) c",
    "{{a|{{b|{{c}}}}|\n{{d}}\n}}x": "x",
    "{{{1|}}}x": "x",
    "{{{1|y}}}x": "yx",
    "{{a|{{{b}}}}}x": "x",
    "{{Infobox\n| a = b\nText without end": "Text without end",
    "{{Infobox\n| a = {{b}\n| c = d\n\nText": "Text",
    "a }} b": "a }} b",
    "{ a } { {b} }": "{ a } { {b} }",
    "{{nowrap|a b}}": "a b",
    "{{Nowrap | 1 = a=b }}": "a=b",
    "{{template:nowrap|a}}": "a",
    "{{no_wrap}} x": "x",
    "{{lang|fr|été}} ({{lang-la|aestas}})": "été (aestas)",
    "{{langx|de|Sommer}}": "Sommer",
    "{{transl|ru|GOST|Moskva}}": "Moskva",
    "5{{nbsp}}km": "5 km",
    "1990{{ndash}}1995{{snd}}x": "1990–1995 – x",
    "{{convert|5|km|mi}}": "5 km",
    "{{convert|5|-|10|km}}": "5–10 km",
    "{{convert|1600|to|2000|sqkm|sqmi}}": "1,600 to 2,000 km²",
    "{{convert|3|x|4|ft|m|abbr=on}}": "3 × 4 ft",
    "{{convert|5|ft|10|in|cm}}": "5 ft 10 in",
    "{{cvt|20|C}}": "20 °C",
    "a {{convert|10|mi|adj=on}} road": "a 10-mi road",
    "{{frac|1|2}} {{frac|3|1|4}}": "1/2 3 1/4",
    "{{val|1.5|0.2|e=6|u=kg}}": "1.5±0.2×10^6 kg",
    "{{circa|1900}}": "c. 1900",
    "{{c.|1900|1910}}": "c. 1900–1910",
    "{{as of|2012|3}}": "As of March 2012",
    "{{as of|2012|lc=y}}": "as of 2012",
    "{{birth date|1879|3|14|df=y}}": "14 March 1879",
    "{{start date|2001|9}}": "September 2001",
    "{{US$|5 million}}": "US$5 million",
    "{{HMS|Victory}}": "HMS Victory",
    "{{USS|Enterprise|CVN-65}}": "USS Enterprise (CVN-65)",
    "{{ill|Foo|de|Bar}}": "Foo",
    "{{ill|Foo|de|Bar|lt=shown}}": "shown",
    "{{nihongo|Tokyo|東京|Tōkyō}}": "Tokyo (東京, Tōkyō)",
    "{{zh|c=北京|p=Běijīng}}": "北京; Běijīng",
    "{{quote|To be|Hamlet}}": "To be\n— Hamlet",
    "a\n{{bulleted list|b|[[c|d]]}}": "a\n\nb\nd",
    "{{hlist|a|b}}": "a, b",
    "{{abbr|HTML|Hyper}}": "HTML",
    "{{chem|H|2|O}} {{chem2|CO2}}": "H2O CO2",
    "10{{sup|6}} {{e|9}}": "10⁶ ×10⁹",
    "{{formatnum:1234567.5}}": "1,234,567.5",
    "{{lc:ABC}} {{ucfirst:abc}}": "abc Abc",
    "{{PAGENAME}}": "Title",
    "{{#if:x|y|z}}a": "a",
    "{{DEFAULTSORT:Foo, Bar}}a": "a",
    "{{tl|cite}}": "{{cite}}",
    "{{color|red|text}}": "text",
    "{{visible anchor|x}}": "x",
    "{{ordinal|22}} {{ordinal|13}}": "22nd 13th",
    "[[a{{!}}b]]": "b",
    # Elements
    "a<ref>b</ref> c": "a c",
    "a <ref name=x/>.": "a.",
    'a<ref name="x">{{cite|b\n|c}}</ref><ref group="n" name="y" />, d': "a, d",
    "a<REF>b</Ref>c": "ac",
    "a <ref>b c": "a b c",
    "a<!-- b -->c": "ac",
    "a\n<!-- b -->\nc": "a\nc",
    "a <!-- b": "a",
    "<nowiki>[[a]] {{b}} '''c''' <i></nowiki>": "[[a]] {{b}} '''c''' <i>",
    "<nowiki>&lt;</nowiki>": "<",
    "<nowiki>* a</nowiki>": "* a",
    "a<nowiki />b": "ab",
    "<math>x^2</math> is": "is",
    "<gallery>\nFile:a.jpg|b\n</gallery>c": "c",
    "H<sub>2</sub>O, 10<sup>6</sup>, 19<sup>th</sup>": "H2O, 10⁶, 19th",
    "a<br>b<br/>c": "a\nb\nc",
    "<div>a</div><p>b</p>": "a\n\nb",
    "<b>a</b> <span style='x'>b</span>": "a b",
    '<span style="display: none">a</span>b': "b",
    "#include <stdio.h>": "include <stdio.h>",
    "1 < 2 > 0": "1 < 2 > 0",
    "<poem>\na\nb\n</poem>": "a\nb",
    "<pre>\na  [[b]]\n  * c\n</pre>": "a  [[b]]\n  * c",
    "<code>x[1]</code>": "x[1]",
    "<ruby>漢<rp>(</rp><rt>kan</rt><rp>)</rp></ruby>": "漢",
    # Tables
    "a\n{|\n! b\n|-\n| c || {{d}}\n|}\ne": "a\n\ne",
    "{|\n|\n{|\n|b\n|}\n|}\nc": "c",
    ": {|\n| b\n|}\nc": "c",
    "{|\n{|\n|}\nof the outer\n|}\nc": "c",
    "{|\n| never ends\n== H ==\nb": "H\n\nb",
    "<table><tr><td>a<table></table></td></tr></table>b": "b",
    "a\n| left over\n|}": "a",
    # Entities, magic words, spaces
    "a&nbsp;b &amp;lt; &eacute; &#233; &#xE9;": "a b &lt; é é é",
    "&notanentity; &copy 2": "&notanentity; &copy 2",
    "__NOTOC__a __TOC__": "a",
    "__KEIN_INHALTSVERZEICHNIS__\na": "a",
    "the __init__ method": "the __init__ method",
    "a   b\tc": "a b c",
    "a\n\n\n\nb": "a\n\nb",
    "a\r\nb": "a\nb",
    "-{zh-hans:汉;zh-hant:漢}-": "汉",
    # Lines and sections
    "== A ==\nb\n=== C ===\nd": "A\n\nb\n\nC\n\nd",
    "==A== <!-- x -->\nb": "A\n\nb",
    "== A ==\n== B ==\nc": "B\n\nc",
    "== A ==\n=== B ===\nc\n== D ==\n{{x}}": "A\n\nB\n\nc",
    "a\n== References ==\nb\n=== C ===\nd\n== E ==\nf": "a\n\nE\n\nf",
    "a\n==''See also''==\n* b": "a",
    "* a\n** b\n# c\n: d\n; e": "a\nb\nc\nd\ne",
    "* {{cite|x}}\n* a": "a",
    "----\na": "a",
    " indented": "indented",
    "= 5": "= 5",
}


@pytest.mark.parametrize("wikitext", CASES, ids=lambda text: text[:40])
def test_shown_text(wikitext: str) -> None:
    assert clean(wikitext) == CASES[wikitext]


@pytest.mark.parametrize(
    ("language", "wikitext", "text"),
    [
        ("de", "[[Datei:a.jpg|mini|b]][[Kategorie:C]][[Hilfe:D (e)|]]", "D"),
        ("de", "a\n== Einzelnachweise ==\n<references />\n== Weblinks ==\n* b", "a"),
        ("de", '{{enS|word}} {{"|Zitat}}', "word „Zitat“"),
        ("en", "{{enS|word}}a", "a"),
        ("fr", "au {{s|XIX|e}}, {{unité|1500|km}}", "au XIXe siècle, 1 500 km"),
        ("fr", "{{sp|XVI|e|au|XVII|e}}", "XVIe au XVIIe siècle"),
        ("fr", "a\n== Notes et références ==\nb", "a"),
        ("fr", "a\n== References ==\nb", "a"),
        ("es", "{{siglo|XIX||s}} {{esd|5 km}}", "siglo XIX 5 km"),
        ("ja", "{{読み仮名|漢字|かんじ}}は", "漢字(かんじ)は"),
        ("zh", "{{link-en|文|Text}}", "文"),
        ("ru", "a\n== Примечания ==\nb", "a"),
    ],
)
def test_languages(language: str, wikitext: str, text: str) -> None:
    assert clean(wikitext, language) == text


@pytest.mark.parametrize(
    ("rules", "wikitext", "text"),
    [
        ({"keep_math": True}, "Let <math>x_{1}\n= [[2]]</math>.", "Let $x_{1} = [[2]]$."),
        (
            {"keep_code": True},
            "<syntaxhighlight lang=c>\nif (a) {\n    b = c * 2;\n}\n</syntaxhighlight>",
            "if (a) {\n    b = c * 2;\n}",
        ),
        ({"headings": False}, "a\n== B ==\nc", "a\n\nc"),
        ({"dropped_sections": frozenset()}, "a\n== References ==\nb", "a\n\nReferences\n\nb"),
        ({"dropped_sections": frozenset(["b"])}, "a\n== B ==\nc", "a"),
        ({"templates": ("My tpl=2", "other=text")}, "{{my_tpl|a|b}}{{Other|text=c}}", "bc"),
    ],
)
def test_options(rules: dict[str, Any], wikitext: str, text: str) -> None:
    assert clean(wikitext, **rules) == text


HOSTILE = {
    "templates": "{{a|" * 50_000,
    "closed templates": "{{small|" * 20_000 + "}}" * 20_000,
    "deep templates": "{{small|" * 20_000 + "a" * 500_000 + "}}" * 20_000,
    "braces": "{" * 200_000 + "}" * 200_000,
    "parameters": "{{{a|" * 30_000 + "}}}" * 30_000,
    "links": "[[a|" * 50_000,
    "closed links": "[[a|" * 30_000 + "]]" * 30_000,
    "references": "<ref>a" * 50_000,
    "references with space": "<ref >\n\n" * 50_000 + "</ref>",
    "references far from it": "<ref >" + "a" * 50_000 + "<ref>\n\n" * 50_000 + "</ref>",
    "elements": "<math>a<ref>b" * 50_000 + "</ref>",
    "comments": "<!--" * 100_000,
    "tables": "{|\n" * 60_000,
    "closed tables": "{|\n" * 30_000 + "|}\n" * 30_000,
    "open and shut": "{|\n== a ==\n" * 20_000,
    "html tables": "<table>" * 50_000,
    "tags": "<span " * 100_000,
    "sup": "<sup>" * 50_000,
    "quotes": "'" * 200_000,
    "quotes in turn": "''a'''b" * 40_000,
    "headings": "=" * 200_000,
    "heading and spaces": "==" + " " * 100_000 + "a" + "\n==" * 1000,
    "brackets": "[http://a " * 50_000,
    "entities": "&" * 200_000,
    "spaces": " \t" * 200_000,
    "gaps": "({{x}}, " * 50_000,
    "underscores": "__" * 100_000,
    "variants": "-{" * 100_000,
    "arguments": "{{small|" + "a=" * 50_000 + "|" * 50_000 + "}}",
    "argument name": "{{small|" + " " * 200_000 + "}}",
    "hidden": '<span style="display:' * 20_000,
    "rubies": "<rt>" * 50_000,
    "lists": "*#:;" * 50_000,
    "redirect": "#REDIRECT " * 20_000,
    "sections": "\n".join(f"{'=' * (i % 6 + 1)}a{'=' * (i % 6 + 1)}" for i in range(40_000)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_page_takes_long(name: str) -> None:
    """Twice the page takes about twice the time: a page of 2 MB cannot stop a worker."""
    start = time.process_time()
    clean(HOSTILE[name])
    assert time.process_time() - start < 4
