"""Whether a dataset is whole, is what its manifest says, and can be trained on."""

from __future__ import annotations

from dataclasses import dataclass

from mtk.artifacts import verify
from mtk.data.dataset_artifact import DatasetInfo, open_dataset
from mtk.data.indexed_dataset import IndexedDataset
from mtk.data.statistics import token_histogram
from mtk.errors import DataError
from mtk.log import Progress
from mtk.tokenizers import load_tokenizer


@dataclass(frozen=True)
class DatasetCheck:
    """done: what was found to be right, in words. documents, tokens: how many there are."""

    prefix: str
    documents: int
    tokens: int
    done: tuple[str, ...]


def check_dataset(prefix: str, progress: Progress | None = None) -> DatasetCheck:
    """Open a dataset, hash it, count it, and look at every id.

    Raises DataError for files that do not fit each other or hold ids outside the vocabulary,
    and ArtifactError for files that are not those that the manifest records.
    """
    info = open_dataset(prefix)
    dataset = info.open()
    done = ["index and tokens fit each other"]
    if info.artifact is None:
        done.append("no manifest: nothing says what it should hold")
    else:
        verify(info.artifact)
        done.append(f"{len(info.artifact.files)} files have the SHA-256 of their manifest")
        done += _counts(info, dataset)
    if info.tokenizer_folder is not None:
        found = load_tokenizer(info.tokenizer_folder).fingerprint
        if found != info.tokenizer_fingerprint:
            raise DataError(
                f"{info.tokenizer_folder} is not the tokenizer that made {info.prefix}: its "
                f"fingerprint is {found[:12]}..., the manifest records "
                f"{str(info.tokenizer_fingerprint)[:12]}.... Preprocess again."
            )
        done.append("the tokenizer has the recorded fingerprint")
    done += _ids(info, dataset, progress)
    return DatasetCheck(str(info.prefix), dataset.num_documents, dataset.num_tokens, tuple(done))


def _counts(info: DatasetInfo, dataset: IndexedDataset) -> list[str]:
    """The manifest's own counts, where it has those of this pair of files."""
    assert info.artifact is not None
    metrics, name = info.artifact.metrics, info.artifact.path.name
    level = metrics.get("level")
    keys = metrics.get("keys", {})
    recorded = next(
        (keys[key] for key in keys if info.prefix.name == f"{name}_{key}_{level}"), metrics
    )
    found = {
        "documents": dataset.num_documents,
        "sequences": len(dataset),
        "tokens": dataset.num_tokens,
    }
    for what, count in found.items():
        if recorded.get(what, count) != count:
            raise DataError(
                f"{info.prefix} holds {count} {what}, its manifest records {recorded[what]}. "
                f"Preprocess again."
            )
    return [f"{found['documents']:,} documents and {found['tokens']:,} tokens as recorded"]


def _ids(info: DatasetInfo, dataset: IndexedDataset, progress: Progress | None) -> list[str]:
    counts, negative = token_histogram(dataset, progress)
    highest = len(counts) - 1
    if negative:
        raise DataError(f"{info.prefix} holds {negative} tokens below 0. Preprocess again.")
    if info.vocab_size is None:
        return [f"the highest id is {highest}; the vocabulary is not known"]
    if highest >= info.vocab_size:
        outside = int(counts[info.vocab_size :].sum())
        raise DataError(
            f"{info.prefix} holds {outside} tokens with ids up to {highest}, but its tokenizer "
            f"has {info.vocab_size} ids. Preprocess again."
        )
    return [f"all ids lie in the vocabulary of {info.vocab_size}"]
