"""Templates of other languages' wikis that carry text, in the manner of
:mod:`mtk.curation.wikipedia.template_text`."""

from __future__ import annotations

from collections.abc import Callable

from mtk.curation.wikipedia.marks import GONE
from mtk.curation.wikipedia.measures import grouped
from mtk.curation.wikipedia.templates import Call, Handler


def own_handlers(language: str) -> dict[str, Handler]:
    """Of the language alone; none for those that are not known."""
    return _BY_LANGUAGE.get(language.split("-")[0].lower(), {})


def _named(table: dict[str, Handler]) -> dict[str, Handler]:
    return {name: handler for names, handler in table.items() for name in names.split("|")}


def _value(*keys: str) -> Handler:
    return lambda call: call.get(*keys) or GONE


def _between(before: str, behind: str) -> Handler:
    def show(call: Call) -> str:
        value = call.get("texte", "text", "1")
        return f"{before}{value}{behind}" if value else GONE

    return show


def _block(*keys: str) -> Handler:
    return lambda call: f"\n\n{call.get(*keys)}\n\n"


def _measure(group: Callable[[str], str]) -> Handler:
    def show(call: Call) -> str:
        first, *units = call.unnamed() or [""]
        return " ".join(value for value in (group(first), *units[:1]) if value)

    return show


def _spaced(call: Call) -> str:
    return " ".join(value for value in call.unnamed() if value)


def _french_groups(number: str) -> str:
    return grouped(number).replace(",", " ").replace(".", ",")


def _century(word: str) -> Handler:
    """``{{s|XIX|e}}``, ``{{sp|XVI|e|au|XVII|e}}``."""

    def show(call: Call) -> str:
        values = call.unnamed()
        parts = ["".join(values[at : at + 2]) for at in range(0, len(values), 3)]
        links = values[2::3]
        shown = parts[0] if parts else ""
        for link, part in zip(links, parts[1:], strict=False):
            shown += f" {link} {part}"
        return f"{shown} {word}".rstrip()

    return show


def _spanish_century(call: Call) -> str:
    word = {"S": "Siglo ", "s": "siglo "}.get(call.get("3")[:1], "")
    before = " a. C." if call.get("2") == "a" else ""
    return f"{word}{call.get('1')}{before}"


def _reading(call: Call) -> str:
    values = call.unnamed()
    return f"{values[0]}({values[1]})" if len(values) > 1 else call.get("1")


_FRENCH = {
    "s|siècle|sp|siècles": _century("siècle"),
    "s-|s2-|sp-|-s|-sp|-s-": _century(""),
    "s2": _century("siècle"),
    "unité|unite|nb|nombre": _measure(_french_groups),
    "formatnum:": lambda call: _french_groups(call.get("1")),
    "date|date-|jour": _spaced,
    "citation|cita|quote": _between("« ", " »"),
    "citation bloc|début citation bloc": _block("1", "citation"),
    "lien|lien langue": lambda call: call.get("texte", "trad2", "fr", "1"),
    "langue|lang|étranger": _value("texte", "2"),
    "1er|ier": lambda _: "1er",
    "1re|ire": lambda _: "1re",
    "er|re|e|ème|ème2|nd|nde": lambda call: call.name,
    "n°|numéro|numero|no": lambda call: f"no {call.get('1')}".strip(),
    "av jc|avjc|av. j.-c.": lambda _: "av. J.-C.",
    "ap jc|ap. j.-c.": lambda _: "apr. J.-C.",
    "m.|mme|mlle|mgr|dr|st|ste": lambda call: f"{call.name.capitalize()} {call.get('1')}".strip(),
    "terme défini|term|pc|petites capitales|nobr romain|nobr romains|romain|incise2": _value("1"),
    "incise": _between("– ", " –"),
    "japonais": _value("1"),
    "exp|exposant": _value("1"),
}
_GERMAN = {
    '"': _between("„", "“"),
    "zitat|zitat-de": _block("text", "1"),
    "lang": _value("2"),
    "ens|frs|las|grcs|its|ess|rus|jas|zhs|pls|nls|svs|ars|hes|trs|pts|css|hus|els": _value("1"),
    "nowrap|small|nobr": _value("1"),
    "höhe": lambda call: f"{call.get('1')} m",
}
_SPANISH = {
    "esd|nobr|versalita|nowrap|destacado": _value("1"),
    "unidad": _measure(_french_groups),
    "siglo": _spanish_century,
    "cita|cita larga": _block("1"),
    "fecha": lambda call: " de ".join(call.unnamed()[:3]),
    "idioma|lang": _value("2"),
}
_RUSSIAN = {
    "s|nobr|нобр|не переведено|не переведено 2|не переведено 3|не переведено 5|нп|нп2|нп3|нп4|нп5"
    "|iw|комментарий|comment|нет аи 2|акут2": lambda call: (
        call.get("3", "1") if call.name[:2] in ("не", "нп", "iw") else call.get("1")
    ),
    "цитата": _block("1", "текст"),
    "цитата-линия": _block("1"),
    "число": lambda call: _french_groups(call.get("1")),
}
_JAPANESE = {
    "仮リンク": _value("label", "1"),
    "読み仮名|読み仮名 ruby不使用|ruby": _reading,
    "lang": _value("2"),
    "quotation": _block("1"),
}
_CHINESE = {
    "le|link-en|link-ja|link-de|link-fr|link-ru|link-es": lambda call: call.get("3", "1"),
    "tsl|translink": lambda call: call.get("4", "3", "2"),
    "link-": lambda call: call.get("3", "1"),
}
_BY_LANGUAGE = {
    "fr": _named(_FRENCH),
    "de": _named(_GERMAN),
    "es": _named(_SPANISH),
    "ru": _named(_RUSSIAN),
    "ja": _named(_JAPANESE),
    "zh": _named(_CHINESE),
}
