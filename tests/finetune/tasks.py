"""Synthetic RACE, MNLI and QQP files that a word decides, and a tiny BERT for them."""

from __future__ import annotations

import json
import random
from pathlib import Path

from mtk.checkpoint.save import CheckpointContent
from mtk.config import make
from mtk.config.model import ModelConfig
from mtk.models.build import build_model
from mtk.models.init import initialize
from mtk.tokenizers import build_tokenizer
from tests.checkpoint.publish import save_checkpoint
from tests.tokenizers.samples import options

WORDS = "red blue green cold warm north south stone water light dark paper".split()  # noqa: SIM905
SIGNS = ("good", "bad", "fair")
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *SIGNS, "?", "which", "."]


def save_bert(
    folder: Path, *, binary: bool = True, tokenizer: bool = True, vocab_size: int | None = None
) -> Path:
    """A checkpoint of a BERT of two layers with initial weights."""
    home = folder.parent / f"{folder.name}-vocabulary"
    home.mkdir(parents=True)
    (home / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    words = build_tokenizer(
        options(tokenizer_type="BertWordPieceLowerCase", vocab_file=str(home / "vocab.txt"))
    )
    words.save(home / "tokenizer")
    config = make(
        ModelConfig,
        family="bert",
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        seq_length=24,
        vocab_size=vocab_size or words.vocab_size,
        make_vocab_size_divisible_by=8,
        bert_binary_head=binary,
        init_method_std=0.1,
    )
    model = build_model(config)
    initialize(model, config, 3)
    content = CheckpointContent(
        config,
        dict(model.named_parameters()),
        tokenizer_folder=home / "tokenizer" if tokenizer else None,
    )
    save_checkpoint(folder, content, stage="pretrain", config=config, inputs=[], metrics={})
    return folder


def race(folder: Path, count: int, seed: int) -> Path:
    """The right option is the one with the word "good"."""
    chance = random.Random(seed)
    folder.mkdir(parents=True)
    for file in range(2):
        lines = []
        for _ in range(count // 4):
            questions, options, answers = [], [], []
            for _ in range(2):
                right = chance.randrange(4)
                words = [chance.choice(WORDS) for _ in range(4)]
                words[right] = f"{words[right]} good"
                questions.append(f"which {chance.choice(('_ ?', '?'))}")
                options.append(words)
                answers.append("ABCD"[right])
            lines.append(
                {
                    "article": " ".join(chance.choices(WORDS, k=6)) + " .",
                    "questions": questions,
                    "options": options,
                    "answers": answers,
                }
            )
        (folder / f"{file}.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def mnli(path: Path, count: int, seed: int) -> Path:
    """The word at the end of the second sentence is the label."""
    chance = random.Random(seed)
    labels = dict(zip(("entailment", "contradiction", "neutral"), SIGNS, strict=True))
    rows = ["\t".join(f"c{n}" for n in range(12))]
    for uid in range(count):
        label = chance.choice(list(labels))
        one, two = (" ".join(chance.choices(WORDS, k=4)) for _ in range(2))
        columns = [str(uid), *["-"] * 7, one, f"{two} {labels[label]}", label, label]
        rows.append("\t".join(columns))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n")
    return path


def qqp(path: Path, count: int, seed: int) -> Path:
    """Two questions are the same if the first one is good."""
    chance = random.Random(seed)
    rows = ["\t".join(("id", "qid1", "qid2", "question1", "question2", "is_duplicate"))]
    for uid in range(count):
        label = chance.randrange(2)
        one, two = (" ".join(chance.choices(WORDS, k=4)) for _ in range(2))
        sign = SIGNS[0] if label else SIGNS[1]
        rows.append("\t".join((str(uid), "1", "2", f"{sign} {one} ?", f"{two} ?", str(label))))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n")
    return path
