"""Sentence splitting with NLTK's Punkt (Kiss & Strunk 2006), offline.

Parameters come from installed ``punkt_tab`` data, or are learnt from the corpus at hand.
Either way they are kept as JSON beside the dataset, so that a split can be repeated.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mtk.errors import ConfigError, DataError
from mtk.tokenizers.sentence_breaks import SentenceBreaks

BLOCK = 1_000_000  # characters split at a time, as Megatron does
TRAINING_BYTES = 2_000_000  # text that abbreviations are learnt from
# Learning from little text misses these; without them "Dr. Smith" is two sentences.
ENGLISH_ABBREVIATIONS = (
    "mr mrs ms dr prof rev hon st jr sr messrs mt gen col maj capt lt sgt gov sen rep pres "
    "inc ltd co corp bros dept univ assn est vs etc al fig figs eq eqs sec ch vol no nos pp p "
    "ed eds jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri "
    "sat sun ave blvd rd approx e.g i.e u.s u.k u.n a.m p.m d.c ph.d cf viz"
)


@dataclass(frozen=True)
class PunktSplitter:
    """Cuts text into sentences by the parameters in the file ``path``.

    keep_newlines: every character of the text stays, white space at the end of the
    sentence before it, so that the sentences concatenate to the text. The boundaries are
    the same as without. (Megatron's flag also splits "end.Next", without white space.)
    """

    path: str
    keep_newlines: bool

    @cached_property
    def plain(self) -> Any:
        """NLTK's tokenizer with these parameters."""
        from nltk.tokenize.punkt import PunktSentenceTokenizer

        return PunktSentenceTokenizer(read_parameters(Path(self.path)))

    @cached_property
    def _breaks(self) -> SentenceBreaks:
        return SentenceBreaks(self.plain)

    def split(self, text: str) -> list[str]:
        """Sentences of ``text`` in order; none for text of white space only (or, with
        keep_newlines, for empty text only)."""
        sentences: list[str] = []
        for start in range(0, len(text), BLOCK):
            sentences += self._split_block(text[start : start + BLOCK])
        return sentences

    def _split_block(self, block: str) -> list[str]:
        spans = self._breaks.spans(block)
        if not self.keep_newlines:
            return [block[start:end] for start, end in spans]
        # Each sentence reaches to the start of the next one, the first back to the start.
        starts = [0] + [start for start, _ in spans[1:]]
        ends = [*starts[1:], len(block)]
        return [block[start:end] for start, end in zip(starts, ends, strict=True)]


def find_parameters(language: str) -> dict[str, Any] | None:
    """Parameters of the installed ``punkt_tab`` model of ``language``; None if there is none.

    Looks where NLTK looks (NLTK_DATA among others) and downloads nothing. Raises
    ConfigError if NLTK is absent.
    """
    try:
        from nltk.tokenize.punkt import PunktTokenizer
    except ImportError as error:
        raise ConfigError("--split-sentences needs the package nltk: pip install nltk.") from error
    try:
        return _as_json(PunktTokenizer(language)._params, language, "nltk punkt_tab")
    except (LookupError, ValueError, OSError):
        return None


def learn_parameters(texts: Iterable[str], language: str) -> dict[str, Any]:
    """Parameters learnt from the first 2 MB of ``texts``, English abbreviations added."""
    from nltk.tokenize.punkt import PunktTrainer

    trainer = PunktTrainer()
    left = TRAINING_BYTES
    for text in texts:
        trainer.train(text[:left], finalize=False)
        left -= len(text)
        if left <= 0:
            break
    trainer.finalize_training()
    parameters = trainer.get_params()
    if language == "english":
        parameters.abbrev_types.update(ENGLISH_ABBREVIATIONS.split())
    return _as_json(parameters, language, "learnt from the corpus")


def write_parameters(parameters: dict[str, Any], path: Path) -> None:
    text = json.dumps(parameters, indent=0, ensure_ascii=False, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def _as_json(parameters: Any, language: str, origin: str) -> dict[str, Any]:
    return {
        "language": language,
        "origin": origin,
        "abbrev_types": sorted(parameters.abbrev_types),
        "collocations": sorted(list(pair) for pair in parameters.collocations),
        "sent_starters": sorted(parameters.sent_starters),
        "ortho_context": dict(sorted(parameters.ortho_context.items())),
    }


def read_parameters(path: Path) -> Any:
    """What :func:`write_parameters` wrote, as NLTK's object. Raises DataError."""
    from nltk.tokenize.punkt import PunktParameters

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        parameters = PunktParameters()
        parameters.abbrev_types = set(content["abbrev_types"])
        parameters.collocations = {(first, second) for first, second in content["collocations"]}
        parameters.sent_starters = set(content["sent_starters"])
        parameters.ortho_context = defaultdict(int, content["ortho_context"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} does not hold Punkt parameters: {error!r}.") from error
    return parameters
