"""One document of a dataset: its tokens, its text, its record, and whether they agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mtk.data.dataset_artifact import DatasetInfo
from mtk.data.provenance import Origin, find_origins
from mtk.data.records import parse_record
from mtk.errors import ConfigError, Problem
from mtk.tokenizers import Tokenizer, load_tokenizer
from mtk.tokenizers.punkt import PunktSplitter

Agreement = Literal["same", "different", "not compared"]


@dataclass(frozen=True)
class ShownDocument:
    """sequences: ids of each. text: None if the tokenizer is not known. origin: None, with the
    reason in ``unknown``. agreement: of the ids with those of the record, tokenized again."""

    document: int
    sequences: tuple[tuple[int, ...], ...]
    text: str | None
    origin: Origin | None
    unknown: str
    agreement: Agreement


def show_document(info: DatasetInfo, document: int, *, verify_digest: bool = True) -> ShownDocument:
    """Look a document up. Raises ConfigError for a number that the dataset does not have."""
    dataset = info.open()
    count = dataset.num_documents
    if not 0 <= document < count:
        rule = f"must be one of the documents 0 to {count - 1} of {info.prefix}"
        nearest = f"Nearest: {min(max(document, 0), count - 1)}."
        raise ConfigError([Problem("document", document, rule, nearest)])
    first, last = dataset.document_indices[document : document + 2].tolist()
    sequences = tuple(tuple(dataset[i].tolist()) for i in range(first, last))
    origins = find_origins(info, [document], verify_digest=verify_digest)
    origin = origins.found.get(document)
    tokenizer = None if info.tokenizer_folder is None else load_tokenizer(info.tokenizer_folder)
    text = None
    if tokenizer is not None:
        text = tokenizer.decode([i for ids in sequences for i in ids])
    again = None if tokenizer is None or origin is None else _encoded(info, origin, tokenizer)
    agreement: Agreement = "not compared"
    if again is not None:
        agreement = "same" if again == sequences else "different"
    return ShownDocument(document, sequences, text, origin, origins.unknown, agreement)


def _encoded(
    info: DatasetInfo, origin: Origin, tokenizer: Tokenizer
) -> tuple[tuple[int, ...], ...] | None:
    """The ids of a record, as preprocess makes them; None for what came through a merge."""
    artifact = info.artifact
    if artifact is None or artifact.stage != "preprocess":
        return None
    config, name = artifact.config, artifact.path.name
    level = artifact.metrics["level"]
    keys = [k for k in config["json_keys"] if info.prefix.name == f"{name}_{k}_{level}"]
    if not keys:
        return None
    (value,) = parse_record(origin.record, keys, plain=origin.plain)
    if isinstance(value, list):
        texts = value
    elif config["split_sentences"]:
        parameters = artifact.folder / f"{name}.punkt.json"
        texts = PunktSplitter(str(parameters), config["keep_newlines"]).split(value)
    else:
        texts = [value]
    found = [list(ids) for ids in tokenizer.encode_batch(texts) if ids]
    if found and config["append_eod"]:
        found[-1].append(tokenizer.eod)
    return tuple(tuple(ids) for ids in found)
