"""What languages call disambiguations, lists and the sections at the end of an article.

English words hold everywhere, those of other languages on their own wiki. Options add more.
"""

from __future__ import annotations

from dataclasses import dataclass

from mtk.curation.wikipedia.names import names, words


@dataclass(frozen=True)
class Words:
    """All in lower case.

    disambiguation: templates that make a page one. endings: of its title, in brackets.
    lists: beginnings of titles. sections: headings of what is not prose.
    """

    disambiguation: tuple[str, ...] = ()
    endings: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    sections: tuple[str, ...] = ()


def words_of(language: str) -> Words:
    """English and the given language (a code as in ``xml:lang``) together."""
    own = LANGUAGES.get(language.split("-")[0].lower(), Words())
    english = LANGUAGES["en"]
    return Words(
        disambiguation=english.disambiguation + own.disambiguation,
        endings=english.endings + own.endings,
        lists=english.lists + own.lists,
        sections=english.sections + own.sections,
    )


def _words(disambiguation: str, endings: str, lists: str, sections: str) -> Words:
    return Words(*(names(text) for text in (disambiguation, endings, lists, sections)))


LANGUAGES = {
    "en": _words(
        "disambiguation|disambig|disamb|disam|dab|dbig|disambiguation page|disambiguation cleanup"
        "|disambig cleanup|disambig-cleanup|dabclean|hndis|hndisambig|hndis-cleanup"
        "|human name disambiguation"
        "|geodis|geo-dis|geodab|place name disambiguation|numberdis|numdab"
        "|letter-number combination disambiguation|letter-numbercombdisambig|letterdis"
        "|mathdab|math disambiguation|mathematical disambiguation|schooldis|school disambiguation"
        "|hospitaldis|hospital disambiguation|roaddis|road disambiguation|airport disambiguation"
        "|callsigndis|call sign disambiguation|chinese title disambiguation|church disambiguation"
        "|genus disambiguation|species latin name disambiguation"
        "|species latin name abbreviation disambiguation|latindab|taxonomy disambiguation"
        "|biology disambiguation|mil-unit-dis|military unit disambiguation"
        "|political party disambiguation"
        "|phonetics disambiguation|music disambiguation|opus disambiguation|station disambiguation"
        "|stationdis|synagogue disambiguation|tndis|template disambiguation|split dab"
        "|wp disambig|wikipedia disambiguation|disambig-class|caselaw disambiguation"
        "|case law disambiguation|fungus disambiguation|plant common name disambiguation"
        "|title disambiguation|portal disambiguation",
        "disambiguation",
        "list of|lists of|index of|outline of",
        "references|external links|external link|see also|further reading|notes|footnotes"
        "|bibliography|sources|citations|notes and references|references and notes|works cited"
        "|notes and citations|references and further reading|external links and references"
        "|general references|cited references|cited sources|sources and further reading"
        "|literature cited|endnotes|explanatory notes",
    ),
    "ar": _words("توضيح", "توضيح", "قائمة", "مراجع|المراجع|وصلات خارجية|انظر أيضا|انظر أيضًا|مصادر"),
    "bg": _words(
        "пояснение|пояснителна страница|disambig",
        "пояснение",
        "списък на|списък с",
        "източници|външни препратки|вижте също|литература|бележки",
    ),
    "ca": _words(
        "desambiguació|desambigua|disambig",
        "desambiguació",
        "llista de|llista d'",
        "referències|enllaços externs|vegeu també|bibliografia|notes",
    ),
    "cs": _words(
        "rozcestník",
        "rozcestník",
        "seznam",
        "reference|externí odkazy|související články|literatura|poznámky|odkazy",
    ),
    "da": _words(
        "flertydig",
        "flertydig",
        "liste over|lister over",
        "referencer|eksterne henvisninger|se også|litteratur|noter|kilder",
    ),
    "de": _words(
        "begriffsklärung|begriffsklärung-dreibuchstabenabkürzung",
        "begriffsklärung",
        "liste der|liste des|liste von|liste deutscher|listen",
        "einzelnachweise|weblinks|literatur|siehe auch|quellen|fußnoten|anmerkungen|belege"
        "|nachweise",
    ),
    "el": _words(
        "αποσαφήνιση|αποσαφ",
        "αποσαφήνιση",
        "κατάλογος",
        "παραπομπές|εξωτερικοί σύνδεσμοι|δείτε επίσης|βιβλιογραφία|πηγές|σημειώσεις",
    ),
    "es": _words(
        "desambiguación|desambiguacion|desambig|desamb",
        "desambiguación",
        "anexo:|lista de",
        "referencias|enlaces externos|véase también|vease también|bibliografía|notas|fuentes"
        "|notas y referencias",
    ),
    "fa": _words(
        "ابهام‌زدایی", "ابهام‌زدایی", "فهرست", "منابع|پانویس|جستارهای وابسته|پیوند به بیرون"
    ),
    "fi": _words(
        "täsmennyssivu",
        "täsmennyssivu",
        "luettelo",
        "lähteet|viitteet|aiheesta muualla|katso myös|kirjallisuutta",
    ),
    "fr": _words(
        "homonymie|homonymes|paronymie|patronyme|toponymie|internationalisation|sigle",
        "homonymie",
        "liste de|liste des|liste du|liste d'",
        "notes et références|références|liens externes|lien externe|voir aussi|bibliographie|notes"
        "|articles connexes|annexes|sources|source",
    ),
    "he": _words(
        "פירושונים", "פירושונים", "רשימת", "הערות שוליים|קישורים חיצוניים|ראו גם|לקריאה נוספת"
    ),
    "hu": _words(
        "egyért",
        "egyértelműsítő lap",
        "listája",
        "források|jegyzetek|további információk|lásd még|külső hivatkozások|irodalom",
    ),
    "id": _words(
        "disambiguasi|disambigu",
        "disambiguasi",
        "daftar",
        "referensi|pranala luar|lihat pula|lihat juga|daftar pustaka|catatan|catatan kaki",
    ),
    "it": _words(
        "disambigua",
        "disambigua",
        "lista di|elenco di",
        "note|bibliografia|voci correlate|collegamenti esterni|altri progetti|riferimenti",
    ),
    "ja": _words(
        "aimai|曖昧さ回避|人名の曖昧さ回避|地名の曖昧さ回避",
        "曖昧さ回避",
        "",
        "脚注|出典|参考文献|関連項目|外部リンク|注釈|注釈・出典",
    ),
    "ko": _words(
        "동음이의|동명이인", "동음이의", "", "각주|외부 링크|같이 보기|참고 문헌|참고문헌|바깥 고리"
    ),
    "nl": _words(
        "dp|dpintro|doorverwijspagina",
        "doorverwijspagina",
        "lijst van",
        "referenties|externe links|externe link|zie ook|literatuur|bronnen|noten|voetnoten"
        "|bronnen, noten en/of referenties",
    ),
    "no": _words(
        "peker|pekerside",
        "andre betydninger",
        "liste over",
        "referanser|eksterne lenker|se også|litteratur|kilder|noter",
    ),
    "pl": _words(
        "ujednoznacznienie|disambigr|disambig",
        "ujednoznacznienie",
        "lista",
        "przypisy|linki zewnętrzne|zobacz też|bibliografia|uwagi",
    ),
    "pt": _words(
        "desambiguação|desambig|disambig",
        "desambiguação",
        "lista de|anexo:",
        "referências|ligações externas|ver também|bibliografia|notas|notas e referências",
    ),
    "ro": _words(
        "dezambiguizare|dezambig",
        "dezambiguizare",
        "lista|listă de",
        "note|referințe|legături externe|vezi și|bibliografie",
    ),
    "ru": _words(
        "неоднозначность|многозначность|список однофамильцев",
        "значения",
        "список|списки",
        "примечания|ссылки|литература|см. также|источники|комментарии",
    ),
    "sr": _words(
        "вишезначна одредница|вишезначна",
        "вишезначна одредница",
        "списак|листа",
        "референце|спољашње везе|види још|литература|извори|напомене",
    ),
    "sv": _words(
        "förgrening|gren|grensida|förgreningssida",
        "olika betydelser",
        "lista över",
        "referenser|externa länkar|se även|källor|litteratur|noter|fotnoter|källhänvisningar",
    ),
    "tr": _words(
        "anlam ayrımı|anlamayrımı",
        "anlam ayrımı",
        "",
        "kaynakça|dış bağlantılar|ayrıca bakınız|notlar|kaynaklar|konuyla ilgili yayınlar",
    ),
    "uk": _words(
        "неоднозначність|багатозначність|disambig",
        "значення",
        "список|перелік",
        "примітки|посилання|література|див. також|джерела|виноски",
    ),
    "vi": _words(
        "trang định hướng|định hướng",
        "định hướng",
        "danh sách",
        "tham khảo|liên kết ngoài|xem thêm|chú thích|ghi chú|thư mục|đọc thêm",
    ),
    "zh": _words(
        "消歧义|消歧義|消歧义页|消歧義頁|disambig",
        "消歧义|消歧義",
        "",
        "参考文献|參考文獻|外部链接|外部連結|参见|參見|参考资料|參考資料|注释|註釋|脚注|腳註|延伸阅读|延伸閱讀",
    ),
}

# Words at the beginning of a page that only points to another, for dumps without <redirect>.
REDIRECTS = names(
    """redirect | weiterleitung | redirection | redirección | redireccion | rinvia |
    redirecionamento | doorverwijzing | patrz | przekieruj | tam | przekierowanie |
    перенаправление | перенапр | omdirigering | uudelleenohjaus | ohjaus | omdiriger |
    перенаправлення | преусмеряване | виж | преусмери | přesměruj | átirányítás | yönlendirme |
    تحويل | הפניה |
    転送 | リダイレクト | 넘겨주기 | 重定向 | đổi | alih | redirecteaza | ανακατευθυνση |
    تغییر_مسیر"""
)

# Prefixes of links to the same page in other languages.
LANGUAGE_CODES = frozenset(
    words(
        """aa ab ace ady af ak als alt am ami an ang ann anp ar arc ary arz as ast atj av avk awa
        ay az azb ba ban bar bat-smg bbc bcl bdr be be-tarask be-x-old bew bg bh bi bjn blk bm
        bn bo bpy br bs btm bug bxr ca cbk-zam cdo ce ceb ch cho chr chy ckb co cr crh cs csb cu
        cv cy da dag de dga din diq dsb dtp dty dv dz ee el eml en eo es et eu ext fa fat ff fi
        fiu-vro fj fo fon fr frp frr fur fy ga gag gan gcr gd gl glk gn gom gor got gpe gsw gu
        guc gur guw gv ha hak haw he hi hif ho hr hsb ht hu hy hyw hz ia iba id ie ig igl ii ik
        ilo inh io is it iu ja jam jbo jv ka kaa kab kbd kbp kcg kg kge ki kj kk kl km kn ko koi
        kr krc ks ksh ku kus kv kw ky la lad lb lbe lez lfn lg li lij lld lmo ln lo lrc lt ltg
        lv mad mai map-bms mdf mg mh mhr mi min mk ml mn mni mnw mo mos mr mrj ms mt mus mwl my
        myv mzn na nah nan nap nb nds nds-nl ne new ng nia nl nn no nov nqo nr nrm nso nup nv ny
        oc olo om or os pa pag pam pap pcd pcm pdc pfl pi pih pl pms pnb pnt ps pt pwn qu rm rmy
        rn ro roa-rup roa-tara ru rue rup rw sa sah sat sc scn sco sd se sg sgs sh shi shn si
        simple sk skr sl sm smn sn so sq sr srn ss st stq su sv sw szl szy ta tay tcy tdd te tet
        tg th ti tk tl tly tn to tpi tr trv ts tt tum tw ty tyv udm ug uk ur uz ve vec vep vi
        vls vo vro wa war wo wuu xal xh xmf yi yo yue za zea zgh zh zh-classical zh-cn
        zh-min-nan zh-tw zh-yue zu"""
    )
)
