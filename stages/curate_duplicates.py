"""The three passes of ``mtk curate duplicates``: sign, match, write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mtk.config.curate_web import CurateDuplicatesConfig
from mtk.curation.groups import Groups
from mtk.curation.keeping import Naming, copies, pair_lines, write_firsts
from mtk.curation.matching import MATCH, MatchPlan, match
from mtk.curation.pages import Source
from mtk.curation.passes import part_numbers
from mtk.curation.shingles import MinHash
from mtk.curation.signing import SignedParts, SignPlan, SignWriting
from stages.curation_step import Desk

SIGN = "sign"


def find_duplicates(desk: Desk, config: CurateDuplicatesConfig, source: Source) -> dict[str, Any]:
    """All passes, or what is left of them; returns metrics."""
    rules, parts, reporting = config.duplicates, desk.parts, desk.step.reporting
    key, reporter = config.text.text_key, desk.session.reporter
    minhash = MinHash(rules.bands, rules.rows, rules.minhash_seed)
    plan = SignPlan(key, rules.shingle_size, rules.shingle, minhash)
    desk.run(SIGN, source, plan, SignWriting(reporting))

    numbers = part_numbers(parts, SIGN)
    folders = [parts.part(number) for number in numbers]
    signed = SignedParts(folders, [parts.facts[number]["documents"] for number in numbers])
    exact = copies(signed)
    groups = Groups(len(signed))
    groups.join_all(exact)
    matching = MatchPlan(
        folders=tuple(map(str, folders)),
        key=key,
        width=rules.shingle_size,
        unit=rules.shingle,
        measure=rules.jaccard,
        listed=rules.pair_similarity,
        joined=rules.group_similarity,
        pivots=rules.bucket_pivots,
    )
    with reporter.progress(f"{desk.step.stage}: match", rules.bands, "bands") as progress:
        match(
            parts,
            signed,
            groups,
            matching,
            bands=rules.bands,
            alone=exact == np.arange(len(signed)),
            workers=desk.workers,
            progress=progress,
        )
    naming = Naming(signed, desk.files, config.records.id_key)
    total = sum((folder / "lines").stat().st_size for folder in folders) / 1e6
    with reporter.progress(desk.step.stage, total, "MB") as progress:
        firsts = groups.all_firsts()
        write_firsts(parts, signed, firsts, exact, naming, reporting, progress)
    if rules.list_pairs:
        _write_pairs(desk, naming)
    found = [parts.facts[number] for number in part_numbers(parts, MATCH)]
    return {
        "compared": sum(facts["compared"] for facts in found),
        "buckets_cut_short": sum(facts["cut"] for facts in found),
        "groups": len(np.unique(firsts[firsts != np.arange(len(firsts))])),
    }


def _write_pairs(desk: Desk, naming: Naming) -> None:
    path = desk.folder / f"{Path(desk.step.config.prefix).name}.pairs.jsonl"
    with path.open("wb") as stream:
        stream.writelines(pair_lines(desk.parts, naming))
