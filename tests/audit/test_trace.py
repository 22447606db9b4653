"""What the trace says a step saw is what its loaders read, and what the corpus holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtk.config import make
from mtk.config.pretrain import PretrainConfig
from mtk.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from mtk.data.token_places import DocumentPart, document_parts
from mtk.data.token_source import Piece
from mtk.errors import CheckpointError, ConfigError, DataError
from mtk.log import Reporter
from mtk.tokenizers import load_tokenizer
from mtk.training.audit import (
    TracedSample,
    check_same_data,
    finetuning,
    pretraining,
    saved_run,
    trace_step,
)
from mtk.training.data import run_data, target_samples, with_vocabulary
from mtk.training.opened_data import open_data
from stages.preprocess import run as preprocess
from stages.pretrain import run as pretrain
from tests.convert.models import llama, save_native, small_tokenizer
from tests.finetune.runs import options as finetune_options
from tests.preprocess.corpora import QUIET, config
from tests.training.test_masked_data import dataset as sentence_dataset
from tests.training.test_pretrain import BASE

SILENT = Reporter(quiet=True)
BAD = '{"text": '


def lines_of(path: Path, rows: list[str]) -> Path:
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets of one tokenizer, each of a corpus with lines that are left out."""
    folder = tmp_path_factory.mktemp("corpora")
    rng = np.random.default_rng(0)
    for name in ("A", "B"):
        words = [f"{name}{n} " * int(rng.integers(1, 30)) for n in range(60)]
        rows = [json.dumps({"text": text}) for text in words]
        for at in (7, 30):
            rows.insert(at, BAD)
        path = lines_of(folder / f"{name}.jsonl", rows)
        more: dict[str, Any] = {"input": (str(path),), "output_prefix": str(folder / name)}
        preprocess(config(folder, append_eod=True, on_bad_line="skip", **more), QUIET)
    return folder


def options(folder: Path, save: Path, **changes: Any) -> PretrainConfig:
    own = {"data_path": [str(folder / "A_text_document")], "split": "90,5,5", "save": str(save)}
    sizes = {"vocab_size": None, "train_iters": 6, "global_batch_size": 8, "seq_length": 24}
    return make(PretrainConfig, **{**BASE, **own, **sizes, **changes})


def batches(settings: PretrainConfig, step: int, rank: int, ranks: int) -> list[Any]:
    """What a rank's own loader gives for a step."""
    data = open_data(settings.data)
    settings = with_vocabulary(settings, data)
    found = run_data(settings, data, target_samples(settings), SILENT, rank, ranks)
    stream = found.train((step - 1) * settings.global_batch_size)
    batch = next(stream)
    stream.close()  # type: ignore[attr-defined]
    return list(batch.micro_batches)


def tokens_of(sample: TracedSample) -> list[int]:
    """The tokens that a trace points at."""
    source = IndexedDataset(sample.dataset)
    found: list[int] = []
    for traced in sample.parts:
        part = traced.part
        assert part is not None
        first, last = source.document_indices[part.document : part.document + 2].tolist()
        document = np.concatenate([source[i] for i in range(first, last)])
        assert len(document) == part.size
        found += document[part.begin : part.end].tolist()
    return found


VARIANTS: dict[str, dict[str, Any]] = {
    "one dataset": {},
    "megatron": {"data_order": "megatron"},
    "packed": {"reset_attention_mask": True, "eod_mask_loss": True},
    "blend": {"data_path": ["0.3", "A", "0.7", "B"]},
    "per split": {"data_path": [], "train_data_path": ["A", "B"], "split": "969,30,1"},
}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_trace_is_what_the_loaders_read(
    corpora: Path, tmp_path: Path, name: str, ranks: int
) -> None:
    changes = {
        key: [str(corpora / f"{v}_text_document") if v in ("A", "B") else v for v in value]
        if key.endswith("data_path")
        else value
        for key, value in VARIANTS[name].items()
    }
    settings = options(corpora, tmp_path, **changes)
    trace = trace_step(pretraining(settings, SILENT, ranks), 3)
    assert not trace.unknown and sorted(s.sample for s in trace.samples) == list(range(16, 24))
    tokenizer = load_tokenizer(corpora / "A.tokenizer")
    for rank in range(ranks):
        for number, batch in enumerate(batches(settings, 3, rank, ranks)):
            mine = [s for s in trace.samples if (s.rank, s.micro_batch) == (rank, number)]
            assert [s.sample for s in mine] == list(batch.indices_B)
            for sample, row, labels in zip(
                mine, batch.tokens_BS.tolist(), batch.labels_BS.tolist(), strict=True
            ):
                assert tokens_of(sample) == [*row, labels[-1]]
    for sample in trace.samples:
        source = IndexedDataset(sample.dataset)
        for traced in sample.parts:
            assert traced.part is not None and traced.origin is not None
            text = json.loads(traced.origin.record)["text"]
            ids = tokenizer.encode_batch([text])[0]
            assert source[traced.part.document].tolist()[:-1] == ids
            assert Path(traced.origin.file).name[0] == Path(sample.dataset).name[0]
            record = Path(traced.origin.file).read_bytes().splitlines(keepends=True)
            assert record[traced.origin.number - 1] == traced.origin.record


def test_sentences_of_bert_are_traced_to_their_document(tmp_path: Path) -> None:
    prefix = str(sentence_dataset())
    settings = make(
        PretrainConfig,
        **{
            **BASE,
            "family": "bert",
            "vocab_size": None,
            "seq_length": 40,
            "max_position_embeddings": 40,
            "data_path": [prefix],
            "save": str(tmp_path),
        },
    )
    run = pretraining(settings, SILENT)
    trace = trace_step(run, 2)
    assert not trace.unknown
    special = set(range(5))
    for sample in trace.samples:
        (traced,) = sample.parts  # the sentences of a sample follow each other
        assert traced.part is not None and traced.origin is not None
        seen = run.samples[sample.sample]
        visible = seen["tokens"][(seen["documents"] == 0) & (seen["loss_mask"] == 0)]
        assert set(visible.tolist()) - special <= set(tokens_of(sample))
        assert json.loads(traced.origin.record)["text"]


def test_a_saved_run(corpora: Path, tmp_path: Path) -> None:
    artifact = pretrain(options(corpora, tmp_path / "ck"), QUIET)
    saved = saved_run(artifact.path)
    assert (saved.stage, saved.step, saved.consumed, saved.ranks) == ("pretrain", 6, 48, None)
    run = pretraining(options(corpora, tmp_path), SILENT)
    check_same_data(run, saved, 3)
    other = options(corpora, tmp_path, data_path=[str(corpora / "B_text_document")])
    with pytest.raises(DataError, match="not those that the checkpoint was trained on"):
        check_same_data(pretraining(other, SILENT), saved, 3)
    smaller = options(corpora, tmp_path, global_batch_size=4, train_iters=12)
    with pytest.raises(DataError, match=r"consumed 48 samples in 6 steps, but .* gives 24"):
        check_same_data(pretraining(smaller, SILENT), saved, 3)
    save_native(tmp_path / "base", llama(seq_length=48, num_layers=1))
    with pytest.raises(CheckpointError, match="does not say what it was trained on"):
        saved_run(tmp_path / "base")


@pytest.mark.parametrize("step", [0, 7])
def test_a_step_that_is_none(corpora: Path, tmp_path: Path, step: int) -> None:
    run = pretraining(options(corpora, tmp_path), SILENT)
    with pytest.raises(ConfigError, match=f"step = {step}: must be one of .*, 1 to 6"):
        trace_step(run, step)


def test_generated_data_have_no_origin(tmp_path: Path) -> None:
    settings = make(PretrainConfig, **{**BASE, "split": "969,30,1", "mock_data": True, "save": "x"})
    trace = trace_step(pretraining(settings, SILENT), 1)
    assert trace.unknown == {"mock data": "its documents are generated"}
    assert all(traced.part and traced.origin is None for s in trace.samples for traced in s.parts)


@pytest.mark.parametrize("packed", [True, False])
def test_packed_conversations_are_traced_to_their_lines(tmp_path: Path, packed: bool) -> None:
    save_native(tmp_path / "base", llama(seq_length=48, max_position_embeddings=64, num_layers=1))
    talks = []
    for number in range(25):
        question = {"role": "user", "content": f"q{number:02}"}
        talks.append({"messages": [question, {"role": "assistant", "content": "a"}]})
    lines = [json.dumps(talk) for talk in talks]
    lines[4] = BAD
    # Two conversations stand in one line.
    lines[9] = json.dumps({"messages": [*talks[9]["messages"], {"role": "system", "content": "s"},
                                        *talks[9]["messages"]]})  # fmt: skip
    path = lines_of(tmp_path / "talk.jsonl", lines)
    more: dict[str, Any] = {"chat_template": "plain", "packing": packed, "vocab_size": None}
    more |= {"on_bad_line": "skip", "train_iters": 3, "train_data": [str(path)]}
    settings = finetune_options("sft", tmp_path / "base", tmp_path / "ck", **more)
    run = finetuning(settings, SILENT)
    trace = trace_step(run, 1)
    tokenizer = small_tokenizer()
    assert not trace.unknown
    several = 0
    raw = path.read_bytes()
    for sample in trace.samples:
        text = tokenizer.decode(run.samples[sample.sample]["tokens"].tolist())
        several += len(sample.parts) > 1
        for traced in sample.parts:
            assert traced.origin is not None
            record = json.loads(raw[traced.origin.begin : traced.origin.end])
            assert record == json.loads(lines[traced.origin.number - 1])
            assert record["messages"][0]["content"] in text
    assert bool(several) == packed


def test_parts_of_documents(tmp_path: Path) -> None:
    """Sentences, empty documents, and what begins inside a sentence."""
    with IndexedDatasetWriter(tmp_path / "d", "<u2") as writer:
        for lengths in ([], [3, 4], [], [], [5], [2, 2, 2], []):
            writer.add_document(np.zeros(sum(lengths)), lengths)
    source = IndexedDataset(tmp_path / "d")
    pieces = [Piece(0, 2, 1), Piece(1, 0, 4), Piece(2, 0, 5), Piece(3, 0, 2), Piece(5, 1, 1)]
    assert document_parts(source, pieces) == [
        DocumentPart(1, 2, 7, 7),
        DocumentPart(4, 0, 5, 5),
        DocumentPart(5, 0, 2, 6),
        DocumentPart(5, 5, 6, 6),
    ]
