"""Names of templates whose text needs no thought, for ``template_text``."""

from __future__ import annotations

from mtk.curation.wikipedia.marks import shown

# Templates that show one of their values, by its number.
SHOWN_VALUE = {
    "1": """
        nowrap | nobr | nobreak | nowraplinks | nobold | noitalic | normal | small | smaller |
        smalldiv | big | larger | resize | em | strong | strongbad | abbr | abbrlink | tooltip |
        h:title | hover title | mvar | math | bigmath | tmath | var | varserif | samp | code |
        codett | mono | tt | kbd | keypress2 | key | pre | pre2 | not a typo | notatypo | typo |
        proper name | as written | vanchor | visible anchor | visible anchors | annotated link |
        flag | flagcountry | flagu | flagdeco+link | flag+link | noflag | flaglist |
        flagathlete | avoid wrap | noitalics | italics correction | italic correction | ic |
        underline | u | strike | s | del | ins | bold | b | i | italic | italics | smallcaps |
        sc | smallcaps all | caps | allcaps | serif | sans-serif | font | transl2 | no italic |
        center | centre | align | poem | poemquote | poem quote | verse translation | indent |
        block indent | in5 | stack begin | plainlist | flatlist | block | nts |
        number table sorting | url | chem2 | translation needed | midsize | linktext |
        quote box2 | red | green | blue | hanging indent | outdent | para2 | ipa link |
        ipalink | ruby | ruby-ja | furigana | lower | raise | first word | large | huge |
        tone superscript | nastaliq | unicode | script/arabic | script/hebrew | script/greek |
        hebrew | rtl-para | lts | polytonic | iast | iso 15919 | contradict-inline text | text |
        clarify span | cn span2 | r-to-l | rtl | ltr | bdi | bdo
    """,
    "2": """
        lang | lang2 | rtl-lang | rtl lang | native name | native phrase | native-name | langx |
        lang-x | color | colour | font color | font colour | colored text | coloured text |
        fontcolor | colorbox text | sort | resize2 | wikt-lang | abbr2 | script | script/text |
        sorttext
    """,
}
LAST_VALUE = """
    transl | transliteration | translit | xlit | tlit | resize | fontsize | font size |
    wikt-lang | wt | linktext | highlight | background color | text color
"""
# Templates without values.
CONSTANTS = {
    "nbsp|space|spaces|sp|nb space|non-breaking space|thinspace|thinsp|thin space": " ",
    "hair space|hairsp|hsp|nnbsp": " ",
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
BEFORE = {  # what stands in front of the first value
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
AROUND = {  # what stands before and behind the first value
    "angbr|angle bracket|angle brackets|angbr ipa": "⟨|⟩",
    "bracket|brackets|sqbracket|square bracket": shown("[") + "|" + shown("]"),
    "gloss|single quotes|single+single": "'|'",
    "double quotes|double+double|qq": '"|"',
    "paren|parentheses": "(|)",
    "bce|bc": "| BC",
    "abs": shown("|") + "|" + shown("|"),
}
