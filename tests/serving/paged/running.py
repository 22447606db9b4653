"""Runs requests on a paged batch without an engine."""

from __future__ import annotations

from typing import Any

import torch

from mtk.models.gpt import GPT
from serving.generation import RunningSequence, Vocabulary
from serving.paged.batch import PagedBatch, PagedSettings
from serving.requests import GenerationRequest, SequenceOutput
from serving.sampling import SamplingParams
from tests.serving.models import ByteTokenizer

GREEDY = SamplingParams(temperature=0)
CONTEXT = 96
# Far more than any of these tests needs; a schedule that gets nowhere ends here.
MOST_STEPS = 5000


def make_batch(model: GPT, **values: Any) -> PagedBatch:
    report = values.pop("report", print)
    settings = {"rows": 3, "context": CONTEXT, "blocks": 18, **values}
    vocabulary = Vocabulary(ByteTokenizer(), model.config.vocab_size or 257)
    with torch.inference_mode():
        return PagedBatch(model, vocabulary, PagedSettings(**settings), report)


def ask(*prompts: tuple[int, ...], **values: Any) -> GenerationRequest:
    return GenerationRequest(**{"prompts": prompts, "max_tokens": 12, "sampling": GREEDY, **values})


def sequences(batch: PagedBatch, *requests: GenerationRequest) -> list[RunningSequence]:
    vocabulary = batch._vocabulary
    return [
        RunningSequence(request, index, vocabulary)
        for request in requests
        for index in range(request.sequences)
    ]


@torch.inference_mode()
def drain(batch: PagedBatch) -> None:
    for _ in range(MOST_STEPS):
        batch.step()
        if not batch.count and not batch._pending:
            break
    else:
        raise AssertionError("the schedule gets nowhere")
    assert batch.pool.used == 0 and batch.pool.available == batch.pool.capacity
    assert sorted(batch.scheduler.slots) == list(range(len(batch.scheduler.slots)))


def generate_paged(
    model: GPT, *requests: GenerationRequest, **values: Any
) -> tuple[list[SequenceOutput], PagedBatch]:
    """All outputs, and the batch, which must have freed everything."""
    batch = make_batch(model, **values)
    made = sequences(batch, *requests)
    for sequence in made:
        batch.add(sequence)
    drain(batch)
    assert [sequence.error for sequence in made] == [None] * len(made)
    return [sequence.output() for sequence in made], batch
