"""Links to the text that readers see; pictures, categories and other languages to nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mtk.curation.wikipedia.marks import GONE
from mtk.curation.wikipedia.names import words
from mtk.curation.wikipedia.site import CATEGORY, FILE, Site
from mtk.curation.wikipedia.words import LANGUAGE_CODES

_BRACKETS = re.compile(r"\[\[|\]\]")
_PROTOCOL = (
    r"(?:(?:https?|ftp|ircs?|git|svn|gopher|telnet|nntp|worldwind|mms|sftp|ssh):)?//|mailto:|news:"
)
_EXTERNAL = re.compile(
    rf"\[(?:{_PROTOCOL})[^\s\[\]<>\"]*[ \t]*((?:[^\[\]\n]|\[\[[^\[\]\n]*\]\])*)\]", re.IGNORECASE
)
_IN_BRACKETS = re.compile(r"\s*[(（][^()（）]*[)）]\s*$|,[^,]*$")


@dataclass(frozen=True)
class LinkRules:
    """Prefixes in lower case. dropped: files and categories, as this wiki calls them."""

    dropped: frozenset[str]
    namespaces: frozenset[str]


def link_rules(site: Site) -> LinkRules:
    english = {"file", "image", "category"}
    local = {name.lower() for number in (FILE, CATEGORY) for name in site.names_of(number)}
    spaces = {name.lower() for _, name in site.namespaces if name}
    return LinkRules(
        frozenset(english | local | _ALIASES), frozenset(spaces | english | _EVERYWHERE)
    )


# Understood by every wiki.
_EVERYWHERE = frozenset(
    words("talk user project wikipedia wp mediawiki template help portal draft")
)

# Short or older names of the file and category namespaces, which dumps do not list.
_ALIASES = frozenset(
    words(
        """bild datei fichier archivo imagen immagine imagem ficheiro arquivo afbeelding
        bestand plik grafika изображение файл зображення слика датотека картинка
        kategorie catégorie categoría categoria kategoria kategori категория категорія
        画像 ファイル 文件 图像 圖像 檔案 분류
        파일 그림 hình tiedosto kuva fil kép fájl soubor resim dosya
        קובץ תמונה ملف صورة تصنيف פרטי"""
    )
)


def resolve_links(text: str, rules: LinkRules) -> str:
    """External ones first: their labels may hold internal ones."""
    if "//" in text or "mailto:" in text or "news:" in text:
        text = _EXTERNAL.sub(lambda found: found[1].strip() or GONE, text)
    if "[[" not in text:
        return text
    stack: list[list[str]] = [[]]
    position = 0
    for found in _BRACKETS.finditer(text):
        stack[-1].append(text[position : found.start()])
        position = found.end()
        if found[0] == "[[":
            stack.append([])
        elif len(stack) > 1:
            inner = "".join(stack.pop())
            stack[-1].append(_shown(inner, rules))
        else:
            stack[-1].append("]]")  # as in a[b[0]]
    stack[-1].append(text[position:])
    return "".join(piece for level in stack for piece in level)


def _shown(inner: str, rules: LinkRules) -> str:
    target, bar, label = inner.partition("|")
    if "\n" in target.strip() or "\n=" in inner:
        return inner  # brackets whose own end is missing
    target = target.strip()
    if target.startswith(":"):
        return label.strip() or (_trick(target[1:], rules) if bar else target[1:].strip())
    prefix, colon, _ = target.partition(":")
    if colon:
        prefix = prefix.replace("_", " ").strip().lower()
        if prefix in rules.dropped or prefix in LANGUAGE_CODES:
            return GONE
    if not bar:
        return target.replace("_", " ")
    return label if label.strip() else _trick(target, rules)


def _trick(target: str, rules: LinkRules) -> str:
    """``[[Help:Boston, Massachusetts|]]`` and ``[[Mercury (planet)|]]`` show what is left
    without namespace, place and brackets."""
    prefix, colon, rest = target.partition(":")
    if colon and prefix.replace("_", " ").strip().lower() in rules.namespaces:
        target = rest
    return _IN_BRACKETS.sub("", target).strip()
