"""``mtk curate wikipedia``: a Wikipedia dump to clean articles as JSON lines."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtk import __version__
from mtk.artifacts import Artifact, InputRecord, publish_prefix
from mtk.artifacts.hashing import sha256_json
from mtk.artifacts.parts import Parts, remove_parts
from mtk.config import config_digest
from mtk.config.curate_wikipedia import CurateWikipediaConfig
from mtk.curation.wikipedia.extract import Counts, Extraction
from mtk.curation.wikipedia.filter import PageRules
from mtk.curation.wikipedia.links import link_rules
from mtk.curation.wikipedia.parts import DROPPED, RECORDS, PartRules, extract_parts, join_parts
from mtk.curation.wikipedia.site import Site, read_site
from mtk.curation.wikipedia.text import TextRules
from mtk.curation.wikipedia.words import Words, words_of
from mtk.data.dataset_artifact import refuse_foreign
from mtk.data.sources import expand_inputs
from mtk.data.stop import terminate_cleanly
from mtk.data.workers import choose_workers
from mtk.errors import DataError
from mtk.session import Session
from stages.preprocess import corpus_inputs, refuse_changed, stamps
from stages.skip import up_to_date

STAGE = "curate wikipedia"
LISTED = ".dropped.jsonl"
RULES = 1  # raise it when the same dump gives other text: parts of before are then not mixed in


def run(config: CurateWikipediaConfig, session: Session | None = None) -> Artifact:
    """Write ``F.jsonl`` with records {"id", "url", "title", "text"} and ``F.dropped.jsonl``.

    A killed run is continued by the same command; the bytes are those of a run that was not.
    Raises DataError (dump), ArtifactError (output), WorkerError.
    """
    session = session or Session()
    with terminate_cleanly():
        files = expand_inputs(config.input, any_format=True)
        before = stamps(files)
        inputs = corpus_inputs(files)
        done = up_to_date(config.prefix, STAGE, config, inputs, session)
        if done is not None:
            remove_parts(config.prefix)
            return done
        outputs = [Path(config.output), Path(f"{config.prefix}{LISTED}")]
        refuse_foreign(outputs, config.prefix, force=session.force)
        sites = [read_site(path) for path in files]
        _refuse_twice(files, sites)
        with Parts(config.prefix, _key(config, inputs)) as parts:
            try:
                counts = _extract(config, session, files, sites, parts)
                refuse_changed(before)
            except DataError:
                parts.remove()  # of no use once the dump is another
                raise
            artifact = _publish(config, session, inputs, sites, parts, counts)
            parts.remove()
    _report(session, counts)
    return artifact


def _refuse_twice(files: Sequence[Path], sites: Sequence[Site]) -> None:
    """A glob often finds a dump whole and in pieces, or packed in two ways."""
    seen: dict[tuple[str, str], Path] = {}
    for path, site in zip(files, sites, strict=True):
        other = seen.setdefault((site.name, site.first_page), path)
        if other != path and site.name and site.first_page:
            raise DataError(
                f"{other} and {path} both begin with page {site.first_page} of {site.name}: the "
                f"same articles would come twice. Name one of them with --input."
            )


def _extract(
    config: CurateWikipediaConfig,
    session: Session,
    files: Sequence[Path],
    sites: Sequence[Site],
    parts: Parts,
) -> Counts:
    sizes = [path.stat().st_size for path in files]
    done = sum(facts["disk"] for facts in parts.facts)
    if parts.facts:
        session.reporter.info(f"{STAGE}: going on after {done / 1e6:,.0f} MB of an earlier run")
    total = sum(sizes) / 1e6
    with session.reporter.progress(STAGE, total, "MB", done=done / 1e6) as progress:
        counts = extract_parts(
            files,
            [extraction(config, site) for site in sites],
            parts,
            PartRules(config.part_pages, config.list_dropped, config.on_bad_page == "skip"),
            workers=choose_workers(config.workers, sizes),
            progress=progress,
        )
    if not counts.kept:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in counts.dropped.items())
        raise DataError(
            f"none of the {counts.pages:,} pages is kept ({reasons or 'the dump is empty'}). "
            f"Correct --input, or keep more, e.g. with --namespaces."
        )
    return counts


def extraction(config: CurateWikipediaConfig, site: Site) -> Extraction:
    """What the options mean for the pages of one wiki."""
    words = words_of(site.language)
    more = tuple(name.lower() for name in config.disambiguation_templates)
    pages = PageRules(
        namespaces=frozenset(config.namespaces),
        words=dataclasses.replace(words, disambiguation=words.disambiguation + more),
        drop_disambiguations=config.disambiguations == "drop",
        drop_lists=config.lists == "drop",
    )
    return Extraction(
        site=site,
        pages=pages,
        text=text_rules(config, site, words),
        min_characters=config.min_characters,
        revision=config.revision,
        packing=config.packing,
    )


def text_rules(config: CurateWikipediaConfig, site: Site, words: Words) -> TextRules:
    dropped = words.sections if config.end_sections == "drop" else ()
    return TextRules(
        links=link_rules(site),
        language=site.language,
        dropped_sections=frozenset([*dropped, *(name.lower() for name in config.drop_sections)]),
        headings=config.headings,
        keep_math=config.math == "latex",
        keep_code=config.code == "keep",
        templates=config.text_templates,
    )


def _publish(
    config: CurateWikipediaConfig,
    session: Session,
    inputs: Sequence[InputRecord],
    sites: Sequence[Site],
    parts: Parts,
    counts: Counts,
) -> Artifact:
    publishing = publish_prefix(
        config.prefix,
        kind="corpus",
        stage=STAGE,
        config=config,
        inputs=inputs,
        command=session.command,
        force=session.force,
    )
    with publishing as publication:
        join_parts(parts, RECORDS, publication.folder / Path(config.output).name)
        listed = publication.folder / f"{Path(config.prefix).name}{LISTED}"
        if not join_parts(parts, DROPPED, listed):
            listed.unlink()
        publication.metrics |= metrics(counts, sites)
    return publication.artifact


def metrics(counts: Counts, sites: Sequence[Site]) -> dict[str, Any]:
    return {
        "pages": counts.pages,
        "documents": counts.kept,
        "text_bytes": counts.text_bytes,
        "characters": counts.characters,
        "dropped": counts.pages - counts.kept,
        "dropped_by_reason": dict(sorted(counts.dropped.items())),
        "wikis": sorted({site.name for site in sites}),
        "languages": sorted({site.language for site in sites}),
    }


def _key(config: CurateWikipediaConfig, inputs: Sequence[InputRecord]) -> str:
    """What makes parts of an earlier run fit: the same work, by the same program."""
    work = [RULES, __version__, config_digest(config), [item.content for item in inputs]]
    return sha256_json(work)


def _report(session: Session, counts: Counts) -> None:
    session.reporter.info(
        f"{STAGE}: {counts.kept:,} articles of {counts.pages:,} pages, "
        f"{counts.text_bytes / 1e6:,.1f} MB of text"
    )
    if counts.dropped:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in sorted(counts.dropped.items()))
        session.reporter.info(f"{STAGE}: left out: {reasons}")
