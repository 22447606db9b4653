"""Common templates that carry text a reader needs, each with what it shows.

Names and meanings are those of the English Wikipedia, which most others share; redirects
between templates are listed where they are much used. Aliases are separated by ``|``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mtk.curation.wiki_marks import GONE, shown
from mtk.curation.wiki_measures import convert, fraction, grouped_number, value_with_error
from mtk.curation.wiki_moments import as_of, date_of, start_date
from mtk.curation.wiki_templates import Call, Handler, normal_name

# Templates that show one of their values; several numbers: the first that is there.
_SHOWN_VALUE = {
    "1": "nowrap|nobr|nobreak|nowraplinks|nobold|noitalic|normal|small|smaller|smalldiv|big|larger|resize"
    "|em|strong|strongbad|abbr|abbrlink|tooltip|h:title|hover title|mvar|math|bigmath|tmath|var|varserif|samp|code|codett"
    "|mono|tt|kbd|keypress2|key|pre|pre2|not a typo|notatypo|typo|proper name|as written|vanchor|visible anchor"
    "|visible anchors|annotated link|flag|flagcountry|flagu|flagdeco+link|flag+link|noflag|flaglist|flagathlete"
    "|avoid wrap|noitalics|italics correction|italic correction|ic|larger|resize|underline|u|strike|s|del|ins|bold|b"
    "|i|italic|italics|smallcaps|sc|smallcaps all|caps|allcaps|script|serif|sans-serif|font|transl2|no italic"
    "|center|centre|align|poem|poemquote|poem quote|verse translation|indent|block indent|in5|stack begin|plainlist|flatlist"
    "|block|nts|number table sorting|url|chem2|translation needed|midsize|linktext|quote box2|red|green|blue"
    "|hanging indent|outdent|para2|ipa link|ipalink|ruby|ruby-ja|furigana|okina text|lower|raise"
    "|first word|large|huge|tone superscript|nastaliq|unicode|script/arabic|script/hebrew|script/greek|hebrew|rtl-para|lts"
    "|polytonic|iast|iso 15919|contradict-inline text|text|clarify span|cn span2|r-to-l|rtl|ltr|bdi|bdo",
    "2": "lang|lang2|rtl-lang|rtl lang|native name|native phrase|native-name|langx|lang-x|color|colour|font color|font colour"
    "|colored text|coloured text|fontcolor|colorbox text|sort|resize2|wikt-lang|abbr2"
    "|script/text|nihongo2x|sorttext",
}
_LAST_VALUE = "transl|transliteration|translit|xlit|tlit|resize|fontsize|font size|wikt-lang|wt|linktext|highlight|background color|text color"
_CONSTANTS = {
    "nbsp|space|spaces|sp|nb space|non-breaking space|thinspace|thinsp|thin space|hair space|hairsp|hsp|nnbsp": " ",
    "ndash|en dash|endash|–": "–",
    "snd|spnd|spaced ndash|spaced en dash|spndash|dash": " – ",
    "mdash|em dash|emdash|mdashb|—": "—",
    "spd|snds|spaced mdash|smd": " — ",
    "·|dot|middot|bullet|•|bull|dotsep": " · ",
    "'": "'",
    "'s": "'s",
    '"|quotation mark': '"',
    "' \"": "'\"",
    "\" '": "\"'",
    "=": "=",
    "!": "|",
    "!!": "||",
    "(|lb": shown("{"),
    ")|rb": shown("}"),
    "((": shown("{{"),
    "))": shown("}}"),
    "[|!((": shown("["),
    "]|))!": shown("]"),
    "okina|hamza2": "ʻ",
    "hamza": "ʼ",
    "ayin": "ʽ",
    "pi|π": "π",
    "euro|€": "€",
    "mu": "μ",
    "times": "×",
    "minus": "−",
    "degree|deg": "°",
    "prime": "′",
    "pprime|double prime": "″",
    "flat|music flat": "♭",
    "sharp|music sharp": "♯",
    "natural|music natural": "♮",
    "ellipsis|...|…": "…",
    "nbhyph|nbhyphen|hyphen|nb hyphen": "-",
    "indian rupee|indian rupee symbol|₹": "₹",
    "wbr|shy|zwsp|zwj|zwnj|zero width joiner|·wrap|wrap": "",
    "break|br|crlf|crlf2|pb|paragraph break|lf": "\n",
}
_BEFORE = {  # what stands in front of the first value
    "us$|usd|us dollar": "US$",
    "a$|aud|au$": "A$",
    "c$|cad|ca$": "C$",
    "nz$|nzd": "NZ$",
    "hk$|hkd": "HK$",
    "gbp|pound sterling|£|pounds": "£",
    "eur|euro|€": "€",
    "inr|₹|indian rupee": "₹",
    "jpy|yen|¥|jp¥": "¥",
    "cny|rmb": "CN¥",
    "krw|won": "₩",
    "php|₱|peso": "₱",
    "circa|c.|ca.": "c. ",
    "floruit|fl.|fl": "fl. ",
    "reign|r.": "r. ",
    "born|born in|b.": "b. ",
    "died|d.": "d. ",
    "sqrt|radic|√": "√",
    "lit|literal translation|literally|lit.": "lit. ",
    "issn|issn link": "ISSN ",
    "isbn|isbnt": "ISBN ",
    "hms": "HMS ",
    "hmas": "HMAS ",
    "hmcs": "HMCS ",
    "hmnzs": "HMNZS ",
    "ins": "INS ",
    "rms": "RMS ",
    "ss": "SS ",
    "mv": "MV ",
    "sms": "SMS ",
    "gts": "GTS ",
    "uscgc": "USCGC ",
    "uss": "USS ",
    "usns": "USNS ",
    "jds": "JDS ",
    "unichar": "U+",
    "adyear|ad": "AD ",
}
_AROUND = {  # what stands before and behind the first value
    "angbr|angle bracket|angle brackets|angbr ipa": "⟨|⟩",
    "bracket|brackets|sqbracket|square bracket": shown("[") + "|" + shown("]"),
    "gloss|single quotes|single+single": "'|'",
    "double quotes|double+double|qq": '"|"',
    "paren|parentheses": "(|)",
    "bce|bc": "| BC",
    "abs": shown("|") + "|" + shown("|"),
}
_ACCIDENTALS = {"flat": "♭", "b": "♭", "sharp": "♯", "#": "♯", "natural": "♮"}
_SUPERSCRIPT = str.maketrans("0123456789+-−()ni", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁽⁾ⁿⁱ")
_RAISED = frozenset("0123456789+-−()ni")


def superscript(text: str) -> str:
    """Powers as Unicode writes them: 10⁶ is not 106. Letters and others stay on the line."""
    text = text.strip()
    if any(c.isdigit() for c in text) and _RAISED.issuperset(text) or text in ("n", "+", "-", "−"):
        return text.translate(_SUPERSCRIPT)
    return text


def handlers(title: str, extra: Iterable[str] = ()) -> dict[str, Handler]:
    """By template name; functions (``lc:``) with their colon.

    title: of the page, for ``{{PAGENAME}}``. extra: ``NAME=NUMBER``, further templates that
    show one of their values.
    """
    found = {**_COMMON, "pagename": lambda _: title, "fullpagename": lambda _: title}
    for entry in extra:
        name, _, value = entry.rpartition("=")
        found[normal_name(name)] = _value(value)
    return found


def _value(*keys: str) -> Handler:
    return lambda call: call.get(*keys)


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
    by = ", ".join(v for v in (call.get("author", "sign", "2"), call.get("source", "title", "3")) if v)
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
    return "; ".join(dict.fromkeys(call.values[key] for key in keys if call.values.get(key))) or GONE


def _ship(call: Call) -> str:
    prefix, name, number = call.get("1"), call.get("2"), call.get("3")
    return " ".join(v for v in (prefix, name, f"({number})" if number else "") if v)


def _numbered_ship(prefix: str) -> Handler:
    return lambda call: _ship(Call(call.name, {"1": prefix, "2": call.get("1"), "3": call.get("2")}))


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
    "columns-list|column list|columns list|longitem|div col list|cols list": lambda call: f"\n{_last(call)}\n",
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
    "ill|interlanguage link|illm|interlanguage link multi|link-interwiki|ill2|link language": _foreign_link,
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
    for value, names in _SHOWN_VALUE.items():
        found |= dict.fromkeys(names.split("|"), _value(value, "text", "1"))
    found |= dict.fromkeys(_LAST_VALUE.split("|"), _last)
    for names, text in _BEFORE.items():
        found |= dict.fromkeys(names.split("|"), _wrapped(text))
    for names, text in _CONSTANTS.items():
        found |= dict.fromkeys((n for n in names.split("|") if n not in found), _constant(text))
    for names, text in _AROUND.items():
        found |= dict.fromkeys(names.split("|"), _wrapped(*text.split("|")))
    for names, handler in _FUNCTIONS.items():
        found |= dict.fromkeys(names.split("|"), handler)
    return found


_COMMON = _common()
