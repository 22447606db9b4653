"""``mtk curate urls | clean | duplicates | decontaminate``: a crawl to a clean corpus."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtk.artifacts import Artifact, InputRecord, input_file, open_artifact
from mtk.config.curate_rules import CleanRules, DecontaminationRules, UrlRules
from mtk.config.curate_web import (
    CurateCleanConfig,
    CurateDecontaminateConfig,
    CurateDuplicatesConfig,
    CurateUrlsConfig,
)
from mtk.curation.cleaning import CleanPlan, clean_judge
from mtk.curation.contamination import (
    USED,
    CountPlan,
    CountWriting,
    CutPlan,
    CutRules,
    total_counts,
)
from mtk.curation.evaluation_texts import EvaluationFiles, find_files
from mtk.curation.ngrams import NgramTable
from mtk.curation.pages import Source
from mtk.curation.passes import PHASE, part_numbers, total
from mtk.curation.sifting import sifted_writer
from mtk.curation.url_writer import UrlWriting, seen_before
from mtk.curation.urls import DOMAINS, EXTENSIONS, UrlPlan, read_list, url_judge
from mtk.data.stop import terminate_cleanly
from mtk.errors import ConfigError, DataError, Problem
from mtk.session import Session
from stages.curation_step import Desk, Step, curate, input_files
from stages.preprocess import corpus_inputs

KEEP = "keep"  # the one pass of a step that needs no more
COUNT, TABLE, CHOOSE = "count", "table", "choose"


def run_urls(config: CurateUrlsConfig, session: Session | None = None) -> Artifact:
    """Drop records, or lines of .txt files, by their URLs. Raises DataError, ArtifactError."""
    step = Step("curate urls", config, KEEP, KEEP)
    with terminate_cleanly():
        files = input_files(config)
        inputs = corpus_inputs(files) + list_inputs(config.urls)
        plan = _url_plan(config)
        url_judge(plan)  # a missing package is told before anything is read

        def work(desk: Desk) -> dict[str, Any]:
            source = Source(desk.files, config.urls.url_key, "line")
            seen = seen_before(desk.parts, KEEP)
            desk.run(KEEP, source, plan, UrlWriting(step.reporting, seen, config.records.id_key))
            return {
                "blocked_domains": len(plan.domains),
                "blocked_extensions": len(plan.extensions),
            }

        return curate(step, files, inputs, session or Session(), work)


def _url_plan(config: CurateUrlsConfig) -> UrlPlan:
    rules = config.urls
    domains = read_list(rules.domain_list or DOMAINS)
    allowed = {name.lower() for name in rules.allow_domains}
    unknown = sorted(allowed - domains)
    if unknown:
        near = difflib.get_close_matches(unknown[0], domains, n=1)
        fix = f"Did you mean {near[0]}?" if near else "See the list of domains in the manual."
        raise ConfigError([Problem("urls.allow_domains", unknown[0], "is not on the list", fix)])
    return UrlPlan(
        key=rules.url_key,
        id_key=config.records.id_key,
        domains=(domains | {name.lower() for name in rules.block_domains}) - allowed,
        extensions=frozenset(
            f".{name.lstrip('.')}" for name in read_list(rules.extension_list or EXTENSIONS)
        ),
        min_length=rules.min_url_length,
        as_lines=".txt" in Path(config.output).suffixes[-2:],
    )


def list_inputs(rules: UrlRules) -> list[InputRecord]:
    """mtk's own lists too: another release of them is another input."""
    return [
        input_file(rules.domain_list or DOMAINS, "domain list"),
        input_file(rules.extension_list or EXTENSIONS, "extension list"),
    ]


def tokenizer_inputs(rules: CleanRules) -> list[InputRecord]:
    """The tokenizer that counts tokens, if there is one. Raises ArtifactError."""
    if rules.length_tokenizer is None:
        return []
    return [open_artifact(rules.length_tokenizer, "tokenizer").as_input("length tokenizer")]


def run_clean(config: CurateCleanConfig, session: Session | None = None) -> Artifact:
    """Repair texts, then drop what is short, foreign or a notice. Raises DataError, ..."""
    step = Step("curate clean", config, KEEP, KEEP)
    rules = config.clean
    with terminate_cleanly():
        _check_languages(rules.kept_languages)
        files = input_files(config)
        inputs = corpus_inputs(files) + tokenizer_inputs(rules)
        plan = CleanPlan(
            key=config.text.text_key,
            id_key=config.records.id_key,
            repair=rules.repair,
            whitespace=rules.whitespace,
            languages=rules.kept_languages,
            min_tokens=rules.min_tokens,
            min_chars=rules.min_chars,
            javascript_chars=rules.javascript_chars,
            tokenizer=rules.length_tokenizer or "",
        )
        clean_judge(plan)

        def work(desk: Desk) -> dict[str, Any]:
            desk.run(KEEP, _texts(desk, config), plan, lambda f: sifted_writer(f, step.reporting))
            return {"changes": dict(sorted(total(desk.parts, KEEP, "changes").items()))}

        return curate(step, files, inputs, session or Session(), work)


def _texts(desk: Desk, config: Any) -> Source:
    return Source(desk.files, config.text.text_key, config.text.text_documents)


def _check_languages(codes: Sequence[str]) -> None:
    if not codes:
        return
    from mtk.curation.languages import known_languages

    known = known_languages()
    for code in codes:
        if code not in known:
            near = difflib.get_close_matches(code, known, n=1)
            fix = f"Did you mean {near[0]}?" if near else f"Known: {' '.join(sorted(known))}."
            rule = "is not a language that can be told"
            raise ConfigError([Problem("clean.languages", code, rule, fix)])


def run_duplicates(config: CurateDuplicatesConfig, session: Session | None = None) -> Artifact:
    """Keep the first of all texts that are alike. Raises DataError, ArtifactError."""
    from stages.curate_duplicates import find_duplicates

    step = Step("curate duplicates", config, "sign", "write")
    with terminate_cleanly():
        files = input_files(config)
        inputs = corpus_inputs(files)

        def work(desk: Desk) -> dict[str, Any]:
            return find_duplicates(desk, config, _texts(desk, config))

        return curate(step, files, inputs, session or Session(), work)


def run_decontaminate(
    config: CurateDecontaminateConfig, session: Session | None = None
) -> Artifact:
    """Cut out what evaluation sets hold. Raises DataError, ArtifactError."""
    step = Step("curate decontaminate", config, "cut", "cut")
    rules = config.decontamination
    with terminate_cleanly():
        files = input_files(config)
        evaluation = _evaluation_files(rules)
        inputs = corpus_inputs(files) + evaluation_inputs(rules)

        def work(desk: Desk) -> dict[str, Any]:
            return _decontaminate(desk, config, evaluation)

        return curate(step, files, inputs, session or Session(), work)


def evaluation_inputs(rules: DecontaminationRules) -> list[InputRecord]:
    """The files of all evaluation sets. Raises DataError."""
    files = _evaluation_files(rules).all
    return [input_file(path, f"evaluation set {n}") for n, path in enumerate(files, start=1)]


def _evaluation_files(rules: DecontaminationRules) -> EvaluationFiles:
    return EvaluationFiles(
        lambada=find_files(rules.evaluation_lambada, "--evaluation-lambada"),
        race=find_files(rules.evaluation_race, "--evaluation-race"),
        text=find_files(rules.evaluation_text, "--evaluation-text"),
        jsonl=find_files(rules.evaluation_jsonl, "--evaluation-jsonl"),
        keys=rules.evaluation_keys,
    )


def _decontaminate(
    desk: Desk, config: CurateDecontaminateConfig, evaluation: EvaluationFiles
) -> dict[str, Any]:
    rules, parts, reporting = config.decontamination, desk.parts, desk.step.reporting
    source = _texts(desk, config)
    if not part_numbers(parts, TABLE):
        made = NgramTable.build(evaluation.texts(), rules.min_ngram, rules.max_ngram)
        if not len(made):
            raise DataError(
                f"no text of the evaluation sets has {rules.min_ngram} words. Correct the files, "
                f"--evaluation-keys or --min-ngram."
            )
        with parts.grow({PHASE: TABLE, "ngrams": len(made)}) as folder:
            made.save(folder)
    [number] = part_numbers(parts, TABLE)
    table, size = str(parts.part(number)), int(parts.facts[number]["ngrams"])
    desk.run(COUNT, source, CountPlan(config.text.text_key, table), CountWriting(reporting))
    if not part_numbers(parts, CHOOSE):
        counts = total_counts([parts.part(n) for n in part_numbers(parts, COUNT)], size)
        facts = {
            "found": int((counts > 0).sum()),
            "frequent": int((counts >= rules.frequent).sum()),
        }
        with parts.grow({PHASE: CHOOSE, **facts}) as folder:
            np.save(folder / USED, counts < rules.frequent)
    [chosen] = part_numbers(parts, CHOOSE)
    plan = CutPlan(
        key=config.text.text_key,
        id_key=config.records.id_key,
        table=table,
        used=str(parts.part(chosen)),
        rules=CutRules(rules.cut_chars, rules.min_piece_chars, rules.max_pieces),
    )
    desk.run("cut", source, plan, lambda f: sifted_writer(f, reporting))
    return {
        "evaluation_ngrams": size,
        "ngrams_found": parts.facts[chosen]["found"],
        "ngrams_too_frequent": parts.facts[chosen]["frequent"],
        "changes": dict(total(parts, "cut", "changes")),
    }
