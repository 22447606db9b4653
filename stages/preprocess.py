"""``mtk preprocess``: a corpus to ``P_{key}_{document|sentence}.bin/.idx``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mtk.artifacts import Artifact, InputRecord, input_file, publish_prefix
from mtk.artifacts.publish import Publication
from mtk.config.preprocess import PreprocessConfig
from mtk.data.corpus_encoding import CorpusCounts, bad_metrics, check_counts, encode_corpus
from mtk.data.dataset_artifact import pair, refuse_foreign, tokenizer_folder
from mtk.data.encoding import EncodingPlan, choose_workers
from mtk.data.records import read_texts
from mtk.data.sources import expand_inputs, file_format, read_chunks
from mtk.data.stop import terminate_cleanly
from mtk.errors import ConfigError, DataError, Problem
from mtk.session import Session
from mtk.tokenizers import Tokenizer, build_tokenizer, tokenizer_inputs
from mtk.tokenizers.punkt import (
    PunktSplitter,
    find_parameters,
    learn_parameters,
    write_parameters,
)
from stages.skip import up_to_date

STAGE = "preprocess"
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
            return done
        tokenizer = build_tokenizer(config.tokenizer)
        outputs = [path for prefix in _prefixes(config).values() for path in pair(prefix)]
        refuse_foreign(outputs, config.output_prefix, force=session.force)
        return _publish(config, session, before, inputs, tokenizer)


def _publish(
    config: PreprocessConfig,
    session: Session,
    before: Stamps,
    inputs: Sequence[InputRecord],
    tokenizer: Tokenizer,
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
        counts = _encode(config, session, list(before), publication, tokenizer)
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
        }
    _report(session, counts)
    return publication.artifact


def _encode(
    config: PreprocessConfig,
    session: Session,
    files: Sequence[Path],
    publication: Publication,
    tokenizer: Tokenizer,
) -> CorpusCounts:
    name = Path(config.output_prefix).name
    folder = publication.folder / tokenizer_folder(name)
    tokenizer.save(folder)
    sizes = [path.stat().st_size for path in files]
    plan = EncodingPlan(
        tokenizer=str(folder),
        keys=config.json_keys,
        append_eod=config.append_eod,
        splitter=_splitter(config, session, files, publication),
    )
    staged = {key: publication.folder / path.name for key, path in _prefixes(config).items()}
    with session.reporter.progress("preprocess", sum(sizes) / 1e6, "MB") as progress:
        counts = encode_corpus(
            read_chunks(files, config.json_keys, config.text_documents),
            plan,
            staged,
            tokenizer.vocab_size,
            workers=choose_workers(config.workers, sizes),
            skip_bad=config.on_bad_line == "skip",
            bad_list=publication.folder / f"{name}.bad_lines.jsonl",
            progress=progress,
        )
    check_counts(counts, config.max_bad_fraction)
    return counts


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
