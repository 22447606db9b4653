"""A folder of tasks for lm-evaluation-harness with local data, and the harness's own run."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mtk.convert.open_model import OpenedModel
from tests.convert.models import TEXT

WORDS = TEXT.split()

TASKS = {
    "own_lambada": """
output_type: loglikelihood
test_split: test
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
  - metric: acc
    aggregation: mean
    higher_is_better: true
""",
    "own_pages": """
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
    "own_choices": """
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{label}}"
doc_to_choice: "{{choices}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
""",
    "own_texts": """
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs:
  until: [" t", "zz"]
  max_gen_toks: 12
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
""",
}
DATA = {"own_lambada": "passages", "own_pages": "pages"}


def sentence(generator: random.Random, shortest: int, longest: int) -> str:
    return " ".join(generator.choices(WORDS, k=generator.randint(shortest, longest)))


def write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text(lines, encoding="utf-8")
    return path


def right_passages(opened: OpenedModel, count: int) -> list[str]:
    """Passages whose last word is what the model says, so that accuracies are not 0."""
    generator, tokenizer = random.Random(4), opened.tokenizer
    found: list[str] = []
    while len(found) < count:
        context = sentence(generator, 1, 4)
        ids = tokenizer.encode(context)
        if len(ids) > opened.config.positions:
            continue
        with torch.inference_mode():
            word = tokenizer.decode([int(opened.model(torch.tensor([ids]))[0, -1].argmax())])
        alone = word.startswith(" ") and word[1:].isalnum()
        if alone and tokenizer.encode(context + word)[:-1] == ids:
            found.append(context + word)
    return found


def write_tasks(
    folder: Path, *, passages: int = 24, pages: int = 8, right: Sequence[str] = ()
) -> Path:
    """Task files and their data; some texts are longer than any context of these tests.

    right: further passages.
    """
    folder.mkdir()
    generator = random.Random(3)
    texts = [{"text": sentence(generator, 2, 60)} for _ in range(passages)]
    texts += [{"text": text} for text in right]
    write_jsonl(folder / "passages.jsonl", texts)
    long = [{"text": f"{sentence(generator, 1, 200)} \n = x = \n"} for _ in range(pages)]
    write_jsonl(folder / "pages.jsonl", long)
    questions = [
        {
            "question": sentence(generator, 1, 30),
            "choices": [" " + sentence(generator, 1, 4) for _ in range(4)],
            "label": generator.randrange(4),
        }
        for _ in range(passages // 2)
    ]
    write_jsonl(folder / "questions.jsonl", questions)
    for name, text in TASKS.items():
        data = DATA.get(name, "questions")
        head = f"task: {name}\ndataset_path: json\n"
        head += f"dataset_kwargs:\n  data_files:\n    test: {data}.jsonl\n"
        (folder / f"{name}.yaml").write_text(head + text, encoding="utf-8")
    return folder
