"""``mtk corpus demo``: a real corpus on every machine, from Python's own documentation."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from mtk.artifacts import Artifact, input_file, publish_prefix
from mtk.config.corpus import SUFFIX, DemoCorpusConfig
from mtk.data.cloze import cloze_passages
from mtk.data.dataset_artifact import refuse_foreign
from mtk.data.demo_corpus import demo_documents, topics_file
from mtk.data.stop import terminate_cleanly
from mtk.errors import DataError
from mtk.session import Session
from stages.skip import up_to_date

STAGE = "corpus demo"
HELDOUT = ".heldout.txt"
CLOZE = ".cloze.jsonl"


def run(config: DemoCorpusConfig, session: Session | None = None) -> Artifact:
    """Write ``P.jsonl`` and, if asked for, ``P.heldout.txt`` and ``P.cloze.jsonl``.

    Records are ``{"text", "source"}``. Raises ArtifactError if another corpus is there.
    """
    session = session or Session()
    inputs = [input_file(topics_file(), "python topics")]
    done = up_to_date(config.prefix, STAGE, config, inputs, session)
    if done is not None:
        return done
    ends = (SUFFIX, *((HELDOUT,) if config.heldout else ()), *((CLOZE,) if config.cloze else ()))
    outputs = [Path(f"{config.prefix}{end}") for end in ends]
    refuse_foreign(outputs, config.prefix, force=session.force)
    publishing = publish_prefix(
        config.prefix,
        kind="corpus",
        stage=STAGE,
        config=config,
        inputs=inputs,
        command=session.command,
        force=session.force,
    )
    with terminate_cleanly(), publishing as publication:
        publication.metrics |= _write(config, publication.folder / Path(config.prefix).name)
    shown = ", ".join(f"{n:,} {name}" for name, n in publication.metrics.items())
    session.reporter.info(f"corpus demo: {shown.replace('_', ' ')}")
    return publication.artifact


def _write(config: DemoCorpusConfig, prefix: Path) -> dict[str, int]:
    documents = demo_documents()
    if not documents:
        raise DataError("this Python comes without its documentation: no topic, no docstring.")
    heldout = [d for d in documents if config.heldout and d.is_heldout]
    kept = [d for d in documents if not (config.heldout and d.is_heldout)]
    lines = ({"text": d.text, "source": d.source} for d in kept)
    metrics = {"documents": len(kept), "text_bytes": sum(len(d.text.encode()) for d in kept)}
    _write_lines(Path(f"{prefix}{SUFFIX}"), lines)
    if config.heldout:
        text = "\n\n".join(d.text for d in heldout) + "\n"
        Path(f"{prefix}{HELDOUT}").write_text(text, encoding="utf-8")
        metrics |= {"heldout_documents": len(heldout), "heldout_bytes": len(text.encode())}
    if config.cloze:
        passages = cloze_passages(d.text for d in heldout)
        _write_lines(Path(f"{prefix}{CLOZE}"), ({"text": p} for p in passages))
        metrics["cloze_passages"] = len(passages)
    return metrics


def _write_lines(path: Path, records: Iterable[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
