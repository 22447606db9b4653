"""``mtk tokenizer train``: a corpus to a ``tokenizer`` artifact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from mtk.artifacts import Artifact, publish_directory
from mtk.config.tokenizer import TrainTokenizerConfig
from mtk.data.records import read_texts
from mtk.data.sources import expand_inputs
from mtk.data.stop import terminate_cleanly
from mtk.errors import DataError
from mtk.session import Session
from mtk.tokenizers.training import train_tokenizer
from stages.preprocess import corpus_inputs, refuse_changed, stamps
from stages.skip import up_to_date

STAGE = "tokenizer train"


def run(config: TrainTokenizerConfig, session: Session | None = None) -> Artifact:
    """Train on every text of the input. The folder works as ``--tokenizer-model`` and loads
    in transformers. The same corpus gives the same bytes.

    Raises DataError for a bad record (unless they are skipped) or an empty corpus.
    """
    session = session or Session()
    files = expand_inputs(config.input)
    before = stamps(files)
    inputs = corpus_inputs(files)
    done = up_to_date(config.output, STAGE, config, inputs, session)
    if done is not None:
        return done
    publishing = publish_directory(
        config.output,
        kind="tokenizer",
        stage=STAGE,
        config=config,
        inputs=inputs,
        command=session.command,
        force=session.force,
    )
    with terminate_cleanly(), publishing as publication:
        counts = {"documents": 0, "text_bytes": 0}
        bad: Counter[str] = Counter()
        skip = config.on_bad_line == "skip"

        def texts() -> Iterator[str]:
            counts.update(documents=0, text_bytes=0)
            bad.clear()
            found = read_texts(
                files, config.json_keys, config.text_documents, skip_bad=skip, bad=bad
            )
            for text in found:
                counts["documents"] += 1
                counts["text_bytes"] += len(text.encode())
                yield text

        session.reporter.info(f"tokenizer train: {config.type} of {config.vocab_size:,} tokens")
        tokenizer = train_tokenizer(config, texts)
        refuse_changed(before)
        if not counts["text_bytes"]:
            raise DataError("the input holds no text to train on. Correct --input or --json-keys.")
        tokenizer.save(publication.folder)
        publication.metrics |= {
            **counts,
            "bad_by_reason": dict(bad),
            "tokenizer_kind": tokenizer.kind,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.eod,
        }
    if bad:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in sorted(bad.items()))
        session.reporter.warn(f"{bad.total():,} records were left out: {reasons}")
    if tokenizer.vocab_size < config.vocab_size:
        session.reporter.warn(
            f"the corpus is too small for {config.vocab_size:,} tokens: the vocabulary has "
            f"{tokenizer.vocab_size:,}"
        )
    return publication.artifact
