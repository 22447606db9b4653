"""A step of mtk against the same step written as a plain PyTorch loop."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtk.config import make
from mtk.config.optimization import OptimizerConfig, PrecisionConfig
from mtk.models.gpt import GPT
from mtk.parallel.apply import Placed
from mtk.parallel.ranks import Ranks
from mtk.precision.loss_scale import LossScale
from mtk.precision.main_weights import COMPUTE_DTYPES, MainWeights
from mtk.training.batch import GlobalBatch
from mtk.training.evaluate import held_out_loss
from mtk.training.feed import Feed
from mtk.training.loss import token_losses
from mtk.training.objective import NextToken
from mtk.training.optimizer import Optimizer, decays
from mtk.training.passes import Accumulation
from mtk.training.schedule import Schedule
from mtk.training.step import Stepper
from tests.models.sizes import llama_config, small_model


@dataclass
class Micro:
    tokens_BS: Tensor
    labels_BS: Tensor
    loss_mask_BS: Tensor
    documents_BS: Tensor | None = None
    positions_BS: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)


def batch(seed: int, micro_batches: int) -> GlobalBatch:
    """8 samples of 24 tokens, some masked unevenly, cut into ``micro_batches``."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 97, (8, 25), generator=generator)
    mask = (torch.rand(8, 24, generator=generator) > 0.3).float()
    mask[0] = 0.0
    parts = zip(
        text[:, :-1].chunk(micro_batches),
        text[:, 1:].chunk(micro_batches),
        mask.chunk(micro_batches),
        strict=True,
    )
    return GlobalBatch([Micro(*part) for part in parts], samples=8)


def constant(lr: float, weight_decay: float) -> Schedule:
    return Schedule(
        style="constant",
        max_lr=lr,
        min_lr=0,
        init_lr=0,
        warmup=0,
        decay=1,
        wsd_style="linear",
        wsd_decay=0,
        start_wd=weight_decay,
        end_wd=weight_decay,
        wd_style="constant",
        wd_increase=1,
    )


def stepper(model: GPT, precision: str = "fp32", **scale: float) -> Stepper:
    main = MainWeights(dict(model.named_parameters()), COMPUTE_DTYPES[precision])
    config = make(OptimizerConfig, lr=1e-2, weight_decay=0.1, clip_grad=0.5)
    loss_scale = LossScale.start(make(PrecisionConfig, precision=precision, **scale))
    optimizer = Optimizer(main, config)
    return Stepper(
        passes(model),
        main,
        optimizer,
        constant(1e-2, 0.1),
        loss_scale,
        Ranks(),
        Placed.whole(model),
    )


def passes(model: GPT) -> Accumulation:
    return Accumulation(model, NextToken(token_losses), Feed(Ranks()))


def plain_loop(model: GPT, steps: int) -> list[float]:
    """What anybody would write: whole batch, mean over valid tokens, torch's AdamW."""
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for n, p in named if p.ndim == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=1e-2, eps=1e-8)
    losses = []
    for step in range(steps):
        micro = batch(step, 1).micro_batches[0]
        nats = F.cross_entropy(
            model(micro.tokens_BS).flatten(0, 1), micro.labels_BS.flatten(), reduction="none"
        )
        loss = (nats * micro.loss_mask_BS.flatten()).sum() / micro.loss_mask_BS.sum()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        adam.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("micro_batches", [1, 2, 8])
def test_equals_a_plain_loop_for_any_micro_batch(micro_batches: int) -> None:
    ours, plain = small_model(llama_config()), small_model(llama_config())
    runner = stepper(ours)
    losses = [runner.step(batch(i, micro_batches), 0).loss.item() for i in range(5)]
    assert losses == pytest.approx(plain_loop(plain, 5), rel=1e-5)
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5, msg=name)


def test_averaging_per_micro_batch_would_be_noticed() -> None:
    """The mask makes micro-batches unequal, so the classic mistake changes the result."""
    uneven = batch(0, 8)
    counts = {micro.loss_mask_BS.sum().item() for micro in uneven.micro_batches}
    assert len(counts) > 3 and 0.0 in counts


def test_loss_scale_does_not_change_fp32() -> None:
    one, scaled = small_model(llama_config()), small_model(llama_config())
    stepper(one).step(batch(0, 2), 0)
    stepper(scaled, loss_scale=1024.0).step(batch(0, 2), 0)
    for a, b in zip(one.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_bf16_follows_fp32() -> None:
    ours, plain = small_model(llama_config()), small_model(llama_config())
    runner = stepper(ours, "bf16")
    losses = [runner.step(batch(i, 2), 0).loss.item() for i in range(5)]
    assert losses == pytest.approx(plain_loop(plain, 5), rel=2e-2)
    assert all(w.dtype == torch.float32 for w in runner.main.weights.values())


def test_overflow_skips_the_update_and_lowers_the_scale() -> None:
    model = small_model(llama_config())
    before = {name: p.clone() for name, p in model.named_parameters()}
    runner = stepper(model, "fp16", initial_loss_scale=2.0**40, hysteresis=1)
    result = runner.step(batch(0, 2), 0)
    assert not result.applied and runner.loss_scale.scale == 2.0**39
    assert all(torch.equal(before[n].half(), p) for n, p in model.named_parameters())


def test_what_decays() -> None:
    model = small_model(llama_config(add_bias_linear=True))
    plain = {n for n, p in model.named_parameters() if not decays(n, p)}
    assert all("norm" in name or name.endswith("bias") for name in plain)
    assert decays("embedding.tokens.weight", model.embedding.tokens.weight)


def test_optimizer_state_round_trip() -> None:
    first, second = small_model(llama_config()), small_model(llama_config())
    runner, other = stepper(first), stepper(second)
    for i in range(3):
        runner.step(batch(i, 2), 0)
    state = {name: t.clone() for name, t in runner.optimizer.state_tensors().items()}
    for name, weight in runner.main.weights.items():
        other.main.restore(name, weight)
    other.optimizer.restore(state)
    runner.step(batch(9, 2), 0)
    other.step(batch(9, 2), 0)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_held_out_loss_is_exact_and_counts_bytes() -> None:
    model = small_model(llama_config())
    whole, cut = batch(5, 1), batch(5, 4)
    lengths = torch.arange(97) % 5
    a = held_out_loss(passes(model), [whole], Ranks(), lengths)
    b = held_out_loss(passes(model), [cut], Ranks(), lengths)
    assert a == pytest.approx(b)
    micro = whole.micro_batches[0]
    nats = a["loss"] * micro.loss_mask_BS.sum().item()
    text_bytes = (lengths[micro.labels_BS] * micro.loss_mask_BS).sum().item()
    assert a["bits_per_byte"] == pytest.approx(nats / text_bytes / 0.6931471805599453)
