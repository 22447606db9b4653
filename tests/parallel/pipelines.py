"""Tiny pipelines on CPU ranks, and the one process they must equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtk.config.model import ModelConfig
from mtk.models.build import build_model
from mtk.models.gpt import GPT
from mtk.models.init import initialize
from mtk.parallel.collectives import all_reduce
from mtk.parallel.deferred import defer_weight_gradients
from mtk.parallel.pipeline import Pipeline, states_boundary
from mtk.parallel.ranks import Ranks
from mtk.parallel.stages import TIED, Stages, cut, placement, ranges

CPU = torch.device("cpu")
VOCAB, SEQ, BATCH = 30, 8, 2
# Every model has a padded vocabulary (30 -> 32) and weights large enough to matter.
TINY = ModelConfig(
    num_layers=8,
    hidden_size=16,
    num_attention_heads=2,
    seq_length=SEQ,
    vocab_size=VOCAB,
    make_vocab_size_divisible_by=16,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    init_method_std=0.2,
)


@dataclass(frozen=True)
class Batch:
    tokens_BS: Tensor
    labels: Tensor
    positions: Tensor | None = None
    documents_BS: Tensor | None = None


@dataclass(frozen=True)
class Case:
    """split: layers of each stage. tied, rope: of the model. packed: documents in a sample."""

    schedule: str
    split: tuple[int, ...]
    count: int
    tied: bool = True
    rope: bool = False
    packed: bool = False

    @property
    def config(self) -> ModelConfig:
        return replace(
            TINY,
            num_layers=sum(self.split),
            untie_embeddings_and_output_weights=not self.tied,
            position_embedding_type="rope" if self.rope else "learned",
        )


def make_batches(count: int, *, packed: bool = False, seed: int = 0) -> list[Batch]:
    random = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        tokens = torch.randint(0, VOCAB, (BATCH, SEQ + 1), generator=random)
        starts = torch.randint(1, SEQ, (BATCH, 1), generator=random)
        at = torch.arange(SEQ).expand(BATCH, SEQ)
        second = at >= starts
        positions = torch.where(second, at - starts, at) if packed else None
        documents = second.long() if packed else None
        batches.append(Batch(tokens[:, :-1], tokens[:, 1:], positions, documents))
    return batches


def loss_over(batches: Sequence[Batch]) -> Callable[[Any, int], Tensor]:
    """Summed over tokens, divided by the tokens of the step."""
    total = sum(batch.labels.numel() for batch in batches)

    def loss(logits: Tensor, index: int) -> Tensor:
        labels = batches[index].labels
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / total

    return loss


def one_process(config: ModelConfig, batches: Sequence[Batch]) -> tuple[Tensor, GPT]:
    """Loss and a model with the gradients."""
    model = build_model(config)
    initialize(model, config, seed=1)
    loss_function, total = loss_over(batches), torch.zeros(())
    for index, batch in enumerate(batches):
        loss = loss_function(
            model(batch.tokens_BS, batch.positions, documents=batch.documents_BS), index
        )
        loss.backward()
        total += loss.detach()
    return total, model


def materialise(model: GPT) -> GPT:
    model.to_empty(device="cpu")
    initialize(model, model.config, seed=1)
    model.fill_tables(CPU)
    return model


def make_pipeline(
    case: Case,
    ranks: Ranks,
    wrap: Callable[[GPT], nn.Module] = lambda model: model,
    *,
    reshard: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Pipeline:
    """wrap: what surrounds a stage with weights. dtype: of the states between stages."""
    where = placement(ranks.pp.size, len(case.split), v_shape=case.schedule == "zbv")
    modules = [
        materialise(m) for m in cut(case.config, Stages(ranges(case.split), where), ranks.pp.rank)
    ]
    deferred = []
    if case.schedule in ("zero-bubble", "zbv"):
        deferred = [defer_weight_gradients(module) for module in modules]
    return Pipeline(
        [wrap(module) for module in modules],
        where,
        ranks.pp,
        case.schedule,
        states_boundary(case.config.hidden_size, dtype),
        device=CPU,
        deferred=deferred,
        reshard=reshard,
    )


def sum_tied(case: Case, pipeline: Pipeline, ranks: Ranks) -> None:
    """What ``Piece.partial`` asks for after backward."""
    if not case.tied or case.schedule == "zbv":
        return
    for name, parameter in pipeline.named_parameters():
        if name == TIED:
            parameter.grad = all_reduce(parameter.grad, ranks.ends, "ends.tied")


def error(found: Tensor | None, wanted: Tensor | None) -> float:
    """Greatest difference over the greatest wanted value."""
    assert found is not None
    assert wanted is not None
    return ((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12)).item()


def worst(
    pipeline: Pipeline, ranks: Ranks, total: Tensor, loss: Tensor, model: nn.Module
) -> dict[str, float]:
    """Errors of loss and gradients on this rank that are too large; names must be global."""
    wanted = dict(model.named_parameters())
    found = {"loss": error(all_reduce(loss, ranks.pp, "test"), total)}
    for name, parameter in pipeline.named_parameters():
        found[name] = error(parameter.grad, wanted[name].grad)
    limit = {"loss": 1e-6}
    return {name: value for name, value in found.items() if not value <= limit.get(name, 1e-5)}
