"""Common templates that carry text a reader needs, each with what it shows.

Names and meanings are those of the English Wikipedia, which most others share; redirects
between templates are listed where they are much used. Aliases are separated by ``|``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mtk.curation.wikipedia.marks import GONE, shown
from mtk.curation.wikipedia.measures import convert, fraction, grouped_number, value_with_error
from mtk.curation.wikipedia.moments import as_of, date_of, start_date
from mtk.curation.wikipedia.names import names
from mtk.curation.wikipedia.superscript import superscript
from mtk.curation.wikipedia.template_languages import own_handlers
from mtk.curation.wikipedia.template_tables import (
    AROUND,
    BEFORE,
    CONSTANTS,
    LAST_VALUE,
    SHOWN_VALUE,
)
from mtk.curation.wikipedia.templates import Call, Handler, normal_name

_ACCIDENTALS = {"flat": "♭", "b": "♭", "sharp": "♯", "#": "♯", "natural": "♮"}


def handlers(title: str, language: str = "en", extra: Iterable[str] = ()) -> dict[str, Handler]:
    """By template name; functions (``lc:``) with their colon.

    title: of the page, for ``{{PAGENAME}}``. language: of the wiki. extra: ``NAME=NUMBER``,
    further templates that show one of their values.
    """
    found = _COMMON | own_handlers(language)
    found |= {"pagename": lambda _: title, "fullpagename": lambda _: title}
    for entry in extra:
        name, _, value = entry.rpartition("=")
        found[normal_name(name)] = _value(value)
    return found


def _value(*keys: str) -> Handler:
    return lambda call: call.get(*keys) or GONE


def _constant(text: str) -> Handler:
    return lambda _: text


def _wrapped(before: str, behind: str = "") -> Handler:
    def show(call: Call) -> str:
        value = call.get("1")
        return f"{before}{value}{behind}" if value else GONE

    return show


def _joined(separator: str, first: int = 1) -> Handler:
    return lambda call: separator.join(value for value in call.unnamed(first) if value)


def _last(call: Call) -> str:
    values = call.unnamed()
    return values[-1] if values else ""


def _lines(call: Call) -> str:
    return "\n" + "\n".join(value for value in call.unnamed() if value) + "\n"


def _quote(call: Call) -> str:
    text = call.get("text", "quote", "1")
    by = ", ".join(
        v for v in (call.get("author", "sign", "2"), call.get("source", "title", "3")) if v
    )
    return f"\n\n{text}\n" + (f"— {by}\n" if by else "") + "\n" if text else GONE


def _range(word: str) -> Handler:
    """Years from and to, of which one may be missing."""

    def show(call: Call) -> str:
        years = "–".join(value for value in call.unnamed() if value)
        return f"{word}{years}" if years else GONE

    return show


def _nihongo(call: Call) -> str:
    english, kanji, romaji = call.get("1"), call.get("2"), call.get("3")
    inside = ", ".join(value for value in (kanji, romaji, call.get("4", "extra")) if value)
    if not english:
        english, inside = romaji or kanji, kanji if romaji else ""
    more = call.get("5", "extra2")
    return f"{english} ({inside})" + (f" {more}" if more else "") if inside else english


def _scripts(call: Call) -> str:
    """Chinese, Korean: each spelling once, without the names of the systems."""
    keys = ("c", "t", "s", "hangul", "hanja", "kanji", "p", "rr", "mr", "w", "j", "poj", "1")
    return (
        "; ".join(dict.fromkeys(call.values[key] for key in keys if call.values.get(key))) or GONE
    )


def _ship(call: Call) -> str:
    prefix, name, number = call.get("1"), call.get("2"), call.get("3")
    return " ".join(v for v in (prefix, name, f"({number})" if number else "") if v)


def _numbered_ship(prefix: str) -> Handler:
    return lambda call: _ship(
        Call(call.name, {"1": prefix, "2": call.get("1"), "3": call.get("2")})
    )


def _ship_class(call: Call) -> str:
    return f"{call.get('1')}-class {call.get('2')}".strip() if call.get("1") else GONE


def _foreign_link(call: Call) -> str:
    return call.get("lt", "display", "3" if call.name.startswith("link") else "lt", "1", "en", "EN")


def _chemical(call: Call) -> str:
    return "".join(call.unnamed())


def _verse(call: Call) -> str:
    verse = f" {call.get('2')}" if call.get("2") else ""
    return call.get("4") or call.get("1") + verse


def _power(call: Call) -> str:
    base = "10" if call.name == "10^" else "×10"
    return base + superscript(call.get("1"))


def _raised(call: Call) -> str:
    values = call.unnamed()
    return values[0] + superscript(values[1]) if len(values) > 1 else superscript(call.get("1"))


def _first_letter(upper: bool) -> Handler:
    def show(call: Call) -> str:
        value = call.get("1")
        return (value[:1].upper() if upper else value[:1].lower()) + value[1:]

    return show


def _section(call: Call) -> str:
    return " § ".join(value for value in call.unnamed() if value)


def _ordinal(call: Call) -> str:
    digits = call.get("1").replace(",", "")
    if not digits.isdigit():
        return call.get("1")
    tens = int(digits) % 100
    end = "th" if 10 < tens < 20 else {1: "st", 2: "nd", 3: "rd"}.get(tens % 10, "th")
    return call.get("1") + end


def _example(call: Call) -> str:
    """A template that is written about."""
    return shown("{{" + "|".join(call.unnamed()) + "}}")


_FUNCTIONS: Mapping[str, Handler] = {
    "lang-": _value("1"),
    "sic": lambda call: call.get("1") + call.get("2") or GONE,
    "quote|blockquote|cquote|quotation|bquote|quote frame|centered pull quote|rquote": _quote,
    "bulleted list|blist|ubl|ublist|unbulleted list|unbulleted list2|ordered list|numbered list"
    "|ubli|collapsible list2|pagelist2|indented plainlist|olist": _lines,
    "columns-list|column list|columns list|longitem": lambda call: f"\n{_last(call)}\n",
    "vunblist|vubl": _lines,
    "simplenuclide|simplenuclide2|nuclide2|nuclide|isotope": _joined("-"),
    "railgauge|track gauge|bracketed|diagonal split header2": _value("1"),
    "music": lambda call: _ACCIDENTALS.get(call.get("1").lower(), GONE),
    "hlist|flat list|hlist2|comma separated entries|cslist|enum|csl": _joined(", "),
    "sortname": lambda call: f"{call.get('1')} {call.get('2')}".strip(),
    "nihongo|nihongo3|nihongo4|nihongo foot|nihongo krt|nihongo2": _nihongo,
    "zh|lang-zh|zh-full|korean|ko-hhrm|lang-ko": _scripts,
    "ship": _ship,
    "uss|usns|uscgc": _numbered_ship("USS"),
    "sclass|sclass2|sclass-": _ship_class,
    "ill|interlanguage link|illm|interlanguage link multi|link-interwiki|ill2": _foreign_link,
    "convert|cvt|convertabbrev": convert,
    "frac|fraction|sfrac|frac2|fractext|vulgar fraction": fraction,
    "val": value_with_error,
    "formatnum:|formatnum|number|nowrapnum": grouped_number,
    "gaps": _joined(""),
    "linktext": _joined(""),
    "keypress|key press|key top": _joined("+"),
    "menu|menu path": _joined(" > "),
    "chem|chem/link|ce": _chemical,
    "su": _joined(""),
    "sup|super|superscript|smallsup": _raised,
    "sub|subscript|smallsub": _joined(""),
    "e|esp|x10^|10^": _power,
    "as of|as of?|asof": as_of,
    "start date|start-date|start date and age|birth date|birth date and age|bda|birth-date"
    "|birth-date and age|end date|death date|death date and age|dda|death-date and age|film date"
    "|dob|dod|release date|birth date and age2": date_of,
    "date|dts|start and end dates": start_date,
    "reign|r.": _range("r. "),
    "floruit|fl.|fl": _range("fl. "),
    "circa|c.|ca.": _range("c. "),
    "bibleverse|bible verse|sourcetext|bibleref2|bibleref|bible": _verse,
    "slink|section link": _section,
    "ordinal|ord": _ordinal,
    "tl|tlx|tlc|tlp|template link|tl2|para|tld|tag": _example,
    "lc:": lambda call: call.get("1").lower(),
    "uc:": lambda call: call.get("1").upper(),
    "lcfirst:": _first_letter(False),
    "ucfirst:": _first_letter(True),
    "padleft:|padright:": _value("1"),
}


def _common() -> dict[str, Handler]:
    found: dict[str, Handler] = {}
    for value, listed in SHOWN_VALUE.items():
        found |= dict.fromkeys(names(listed), _value(value, "text", "1"))
    found |= dict.fromkeys(names(LAST_VALUE), _last)
    for listed, text in BEFORE.items():
        found |= dict.fromkeys(names(listed), _wrapped(text))
    for listed, text in CONSTANTS.items():
        found |= dict.fromkeys((n for n in names(listed) if n not in found), _constant(text))
    for listed, text in AROUND.items():
        found |= dict.fromkeys(names(listed), _wrapped(*text.split("|")))
    for listed, handler in _FUNCTIONS.items():
        found |= dict.fromkeys(names(listed), handler)
    return found


_COMMON = _common()
