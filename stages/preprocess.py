"""``mtk preprocess``: a corpus to ``P_{key}_{document|sentence}.bin/.idx``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mtk.artifacts import Artifact, InputRecord, input_file, publish_prefix
from mtk.artifacts.hashing import sha256_json
from mtk.artifacts.parts import Parts, remove_parts
from mtk.artifacts.publish import Publication
from mtk.config import config_digest
from mtk.config.preprocess import PreprocessConfig
from mtk.data.checked_encoding import EngineMismatchError
from mtk.data.corpus_encoding import CorpusCounts, CorpusParts, bad_metrics, check_counts
from mtk.data.dataset_artifact import pair, refuse_foreign, tokenizer_folder
from mtk.data.encoding import EncodingPlan, encode_chunks
from mtk.data.indexed_dataset import token_dtype
from mtk.data.records import read_texts
from mtk.data.sources import expand_inputs, file_format, read_chunks
from mtk.data.stop import terminate_cleanly
from mtk.data.workers import choose_workers
from mtk.errors import (
    ArtifactError,
    ConfigError,
    DataError,
    Interrupted,
    Problem,
    WorkerError,
)
from mtk.session import Session
from mtk.tokenizers import Tokenizer, build_tokenizer, tokenizer_inputs
from mtk.tokenizers.engines import AUTO
from mtk.tokenizers.flat import REFERENCE
from mtk.tokenizers.punkt import (
    PunktSplitter,
    find_parameters,
    learn_parameters,
    write_parameters,
)
from stages.skip import up_to_date

STAGE = "preprocess"
PARTS_FORMAT = 1  # raised where older parts would not fit the rest of the output
Stamps = dict[Path, tuple[int, int]]  # bytes, time of the last change in ns


def run(config: PreprocessConfig, session: Session | None = None) -> Artifact:
    """Tokenise every record of the input; the artifact's prefix is ``output_prefix``.

    Raises DataError (input, tokenizer files), ArtifactError (output), WorkerError.
    """
    session = session or Session()
    with terminate_cleanly():
        files = expand_inputs(config.input, config.output_prefix)
        _check_text_keys(config, files)
        before = stamps(files)
        inputs = corpus_inputs(files) + tokenizer_inputs(config.tokenizer)
        done = up_to_date(config.output_prefix, STAGE, config, inputs, session)
        if done is not None:
            with suppress(ArtifactError):
                remove_parts(config.output_prefix)
            return done
        tokenizer = build_tokenizer(config.tokenizer)
        outputs = [path for prefix in _prefixes(config).values() for path in pair(prefix)]
        refuse_foreign(outputs, config.output_prefix, force=session.force)
        key = _parts_key(config, inputs, tokenizer)
        with Parts(config.output_prefix, key) as parts, _kept_for_later(parts):
            return _publish(config, session, before, inputs, tokenizer, parts)


def _parts_key(config: PreprocessConfig, inputs: Sequence[InputRecord], found: Tokenizer) -> str:
    """Parts may be used by work that reads the same and writes the same."""
    content = {
        "format": PARTS_FORMAT,
        "config": config_digest(config),
        "inputs": [[item.role, item.content] for item in inputs],
        "tokenizer": found.fingerprint,
    }
    return sha256_json(content)


@contextmanager
def _kept_for_later(parts: Parts) -> Iterator[None]:
    """Finished parts stay where the same command can do better another time: after a stop, a
    worker that was killed, a full disk. Elsewhere nothing is left."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt, WorkerError, OSError):
        if not len(parts):
            parts.remove()
        raise
    except BaseException:
        parts.remove()
        raise
    parts.remove()


def _publish(
    config: PreprocessConfig,
    session: Session,
    before: Stamps,
    inputs: Sequence[InputRecord],
    tokenizer: Tokenizer,
    parts: Parts,
) -> Artifact:
    publishing = publish_prefix(
        config.output_prefix,
        kind="dataset",
        stage=STAGE,
        config=config,
        inputs=inputs,
        command=session.command,
        force=session.force,
    )
    with publishing as publication:
        counts = _encode(config, session, list(before), publication, tokenizer, parts)
        refuse_changed(before)
        publication.metrics |= {
            "keys": counts.by_key,
            **bad_metrics(counts),
            "level": config.level,
            "append_eod": config.append_eod,
            "tokenizer_kind": tokenizer.kind,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.eod,
            "tokenizer_engine": "+".join(sorted(counts.engines)),
            "compared_records": counts.compared,
        }
    _report(session, counts)
    return publication.artifact


def _encode(
    config: PreprocessConfig,
    session: Session,
    files: Sequence[Path],
    publication: Publication,
    tokenizer: Tokenizer,
    parts: Parts,
) -> CorpusCounts:
    name = Path(config.output_prefix).name
    folder = publication.folder / tokenizer_folder(name)
    tokenizer.save(folder)
    plan = EncodingPlan(
        tokenizer=str(folder),
        keys=config.json_keys,
        append_eod=config.append_eod,
        splitter=_splitter(config, session, files, publication),
        engine=_engine(config, parts),
    )
    dtype = token_dtype(tokenizer.vocab_size)
    try:
        _encode_parts(config, session, files, plan, parts, dtype)
    except EngineMismatchError as error:
        session.reporter.warn(
            f"{error}. All is encoded again by the tokenizer itself, {len(parts)} finished parts "
            f"among it. Please report the text; --tokenizer-engine reference avoids the detour."
        )
        parts.clear()
        plan = replace(plan, engine=REFERENCE)
        _encode_parts(config, session, files, plan, parts, dtype)
    with CorpusParts(parts, config.json_keys, dtype) as corpus:
        check_counts(corpus.counts(), config.max_bad_fraction)
        staged = {key: publication.folder / path.name for key, path in _prefixes(config).items()}
        return corpus.publish(staged, publication.folder / f"{name}.bad_lines.jsonl")


def _engine(config: PreprocessConfig, parts: Parts) -> str:
    """A run that had to fall back on the tokenizer goes on with it."""
    fell_back = len(parts) and parts.facts[-1]["engine"] == REFERENCE
    return REFERENCE if config.tokenizer_engine == AUTO and fell_back else config.tokenizer_engine


def _encode_parts(
    config: PreprocessConfig,
    session: Session,
    files: Sequence[Path],
    plan: EncodingPlan,
    parts: Parts,
    dtype: np.dtype[Any],
) -> None:
    sizes = [path.stat().st_size for path in files]
    with (
        session.reporter.progress("preprocess", sum(sizes) / 1e6, "MB") as progress,
        CorpusParts(parts, config.json_keys, dtype) as corpus,
    ):
        if len(parts):
            session.reporter.info(
                f"preprocess: {len(parts)} parts of an earlier run are kept "
                f"({corpus.done / 1e6:,.0f} of {sum(sizes) / 1e6:,.0f} MB)"
            )
            progress.advance(corpus.done / 1e6, documents=f"{corpus.documents:,}")
        chunks = read_chunks(
            files,
            config.json_keys,
            config.text_documents,
            limit=config.max_record_mb << 20,
            after=corpus.after,
        )
        with closing(encode_chunks(chunks, plan, choose_workers(config.workers, sizes))) as encoded:
            while corpus.add(encoded, progress, skip_bad=config.on_bad_line == "skip"):
                pass


def _splitter(
    config: PreprocessConfig, session: Session, files: Sequence[Path], publication: Publication
) -> PunktSplitter | None:
    if not config.split_sentences:
        return None
    parameters = find_parameters(config.lang)
    if parameters is None:
        session.reporter.warn(
            f"no Punkt data for {config.lang!r} is installed: abbreviations are learnt from the "
            f"corpus itself. For NLTK's own model set NLTK_DATA to a folder with punkt_tab."
        )
        texts = read_texts(files, config.json_keys, config.text_documents, skip_bad=True)
        parameters = learn_parameters(texts, config.lang)
    path = publication.folder / f"{Path(config.output_prefix).name}.punkt.json"
    write_parameters(parameters, path)
    publication.metrics["punkt"] = {key: parameters[key] for key in ("language", "origin")}
    return PunktSplitter(str(path), config.keep_newlines)


def stamps(files: Sequence[Path]) -> Stamps:
    """Size and time of every file; taken before hashing, so that the digest is of what is read."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def refuse_changed(before: Stamps) -> None:
    """Raises DataError if a file is not as it was when :func:`stamps` looked."""
    now = stamps(list(before))
    for path, stamp in before.items():
        if now[path] != stamp:
            raise DataError(f"{path} changed while it was read. Start again when it is final.")


def corpus_inputs(files: Sequence[Path]) -> list[InputRecord]:
    """The corpus by digest; the roles of several files keep their order."""
    if len(files) == 1:
        return [input_file(files[0], "corpus")]
    return [input_file(path, f"corpus {number}") for number, path in enumerate(files, start=1)]


def _prefixes(config: PreprocessConfig) -> dict[str, Path]:
    return {key: Path(f"{config.output_prefix}_{key}_{config.level}") for key in config.json_keys}


def _check_text_keys(config: PreprocessConfig, files: Sequence[Path]) -> None:
    plain = [path for path in files if file_format(path)[0] == ".txt"]
    if plain and len(config.json_keys) > 1:
        rule = f"must be one name for plain text such as {plain[0]}"
        raise ConfigError([Problem("json_keys", config.json_keys, rule, "Nearest: text.")])


def _report(session: Session, counts: CorpusCounts) -> None:
    for key, numbers in counts.by_key.items():
        shown = ", ".join(f"{value:,} {name}" for name, value in numbers.items())
        session.reporter.info(f"preprocess: {key}: {shown.replace('_', ' ')}")
    if counts.num_bad:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in sorted(counts.bad.items()))
        session.reporter.warn(
            f"{counts.num_bad:,} of {counts.records:,} records were left out: {reasons}"
        )
