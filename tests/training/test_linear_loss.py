"""Output matrix and loss in one operation: equal to logits and cross-entropy, whole or in parts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtk.config import make
from mtk.config.bench import BenchConfig
from mtk.config.pretrain import PretrainConfig
from mtk.launch.local import launch
from mtk.launch.process import Place, join
from mtk.log import Reporter
from mtk.models.linear_loss import linear_losses, softmax_minus_target_
from mtk.parallel.ranks import Ranks
from mtk.session import Session
from mtk.training.assemble import LOGITS_BYTES, loss_chunk, make_stepper
from mtk.training.join import ranks_of
from mtk.training.metrics import read_metrics
from mtk.verification.observe import observe, random_sample
from stages.pretrain import run
from tests.models.sizes import llama_config, small_model

CHUNKS = (None, 1, 5, 12, 100)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 6, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(40, 16, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(33, (2, 6), generator=generator)
    upstream = torch.rand(2, 6, generator=generator)
    return x, weight, labels, upstream


def reference(x: Tensor, weight: Tensor, labels: Tensor, used: int) -> Tensor:
    logits = (x @ weight.t())[..., :used].flatten(0, 1).float()
    return F.cross_entropy(logits, labels.flatten(), reduction="none").view_as(labels)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_equals_cross_entropy_of_logits(chunk: int | None) -> None:
    x, weight, labels, upstream = inputs()
    expected = reference(x, weight, labels, 33)
    found = linear_losses(x, weight, labels, 33, chunk)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    grads = torch.autograd.grad((expected * upstream).sum(), (x, weight))
    own = torch.autograd.grad((found * upstream).sum(), (x, weight))
    for one, other in zip(own, grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert not own[1][33:].any()  # the padded vocabulary


@pytest.mark.parametrize("chunk", CHUNKS)
def test_bf16_is_as_near_as_bf16_allows(chunk: int | None) -> None:
    x, weight, labels, upstream = inputs(torch.bfloat16)
    wide = [x.detach().float().requires_grad_(), weight.detach().float().requires_grad_()]
    exact = torch.autograd.grad((reference(*wide, labels, 33) * upstream).sum(), wide)
    own = torch.autograd.grad(
        (linear_losses(x, weight, labels, 33, chunk) * upstream).sum(), (x, weight)
    )
    for one, other in zip(own, exact, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.float() - other).norm() <= 1e-2 * other.norm()


def test_a_frozen_matrix_gets_no_gradient() -> None:
    x, weight, labels, _ = inputs()
    weight.requires_grad_(False)
    for chunk in (None, 5):
        x.grad = None
        linear_losses(x, weight, labels, 33, chunk).sum().backward()
        assert x.grad is not None and weight.grad is None


def test_extreme_logits_stay_numbers() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-3e4, -3e4, -3e4]])
    labels = torch.tensor([1, 2])
    losses = softmax_minus_target_(logits, labels, 3)
    assert losses[0] == 2e4 and losses[1] == pytest.approx(torch.tensor(3.0).log().item(), rel=2e-3)
    assert logits[0].tolist() == [1.0, -1.0, 0.0]


def test_nan_is_not_hidden() -> None:
    logits = torch.tensor([[float("nan"), 1.0]])
    assert softmax_minus_target_(logits, torch.tensor([1]), 2).isnan().all()


def test_the_model_returns_losses_where_it_is_given_labels() -> None:
    model = small_model(llama_config())
    tokens = torch.arange(24).view(1, 24)
    labels = tokens.flip(1)
    expected = F.cross_entropy(model(tokens)[0].float(), labels[0], reduction="none")
    torch.testing.assert_close(model(tokens, labels=labels)[0], expected, rtol=1e-5, atol=1e-6)


TINY: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 16,
    "vocab_size": 97,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "micro_batch_size": 2,
    "global_batch_size": 4,
    "lr": 1e-3,
    "device": "cpu",
}
QUIET = Session(Reporter(quiet=True))


def config(**changes: Any) -> BenchConfig:
    return make(BenchConfig, **(TINY | changes))


def test_a_step_in_chunks_equals_a_step() -> None:
    plain, chunked = config(), config(loss_chunk_tokens=10)
    stepper = make_stepper(chunked, 4, Ranks())
    assert stepper.placed.parts[0].head.chunk == 10
    expected = observe(plain, random_sample(plain), Ranks())
    found = observe(chunked, random_sample(plain), Ranks())
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.norm == pytest.approx(expected.norm, rel=1e-5)


def test_chunks_are_taken_where_logits_are_large() -> None:
    small = config()
    assert loss_chunk(small) is None
    model = dataclasses.replace(small.model, vocab_size=131072, seq_length=131072)
    large = dataclasses.replace(small, model=model)
    assert loss_chunk(large) == LOGITS_BYTES // (2 * 131072)
    asked = dataclasses.replace(small.runtime, loss_chunk_tokens=7)
    assert loss_chunk(dataclasses.replace(large, runtime=asked)) == 7


def test_a_run_in_chunks_trains_and_evaluates_as_one_without(tmp_path: Path) -> None:
    """Evaluation takes the model's logits, training its losses."""
    records = []
    for name, changes in (("plain", {}), ("chunks", {"loss_chunk_tokens": 10})):
        values = {"train_iters": 4, "log_interval": 1, "eval_interval": 2, "eval_iters": 1}
        own = {**TINY, **values, **changes, "mock_data": True, "plots": False}
        run(make(PretrainConfig, **own, save=str(tmp_path / name)), QUIET)
        read = read_metrics(tmp_path / name / "metrics.jsonl")
        records.append([(r["event"], r["loss"]) for r in read])
    assert [event for event, _ in records[0]].count("eval") == 2
    assert [event for event, _ in records[1]] == [event for event, _ in records[0]]
    losses = [[loss for _, loss in found] for found in records]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def losses_of_ranks(place: Place) -> list[float]:
    """Two tensor-parallel ranks: a step's loss and norm, from logits and in chunks."""
    found = []
    with join(place, 60.0) as trace:
        for chunk in (None, 10):
            parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "nproc": 2}
            # Not a multiple of 2 x 128: the second rank has padding.
            own = config(loss_chunk_tokens=chunk, vocab_size=130, **parallel)
            seen = observe(own, random_sample(own), ranks_of(place, own, trace))
            found += [seen.loss, seen.norm]
    return found


def test_ranks_that_share_the_vocabulary_agree() -> None:
    single = config(vocab_size=130)
    expected = observe(single, random_sample(single), Ranks())
    plain_loss, plain_norm, loss, norm = launch(losses_of_ranks, (), 2, timeout=60.0)
    assert loss == pytest.approx(expected.loss, rel=1e-6)
    assert norm == pytest.approx(expected.norm, rel=1e-5)
    assert plain_loss == pytest.approx(loss, rel=1e-6) and plain_norm == pytest.approx(norm, 1e-5)


@pytest.mark.parametrize("chunk", [None, 5])
def test_labels_that_are_none(chunk: int | None) -> None:
    """PyTorch's -100 has neither loss nor gradient; another label outside is never a number."""
    x, weight, labels, upstream = inputs()
    labels[0, 2], labels[1, 1] = -100, -100
    expected = reference(x, weight, labels, 33)
    found = linear_losses(x, weight, labels, 33, chunk)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    grads = torch.autograd.grad((expected * upstream).sum(), (x, weight))
    own = torch.autograd.grad((found * upstream).sum(), (x, weight))
    for one, other in zip(own, grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    labels[0, 0], labels[1, 5] = 33, -1  # of the padded vocabulary, and before it
    wrong = linear_losses(x, weight, labels, 33, chunk).isnan()
    assert wrong.nonzero().tolist() == [[0, 0], [1, 5]]


def test_gradients_are_the_same_twice_and_have_none_of_their_own() -> None:
    x, weight, labels, _ = inputs()
    losses = linear_losses(x, weight, labels, 33)
    first = torch.autograd.grad(losses.sum(), (x, weight), retain_graph=True)
    again = torch.autograd.grad(losses.sum(), (x, weight), retain_graph=True)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    # Of a derivative there is none: better an error than a wrong one.
    (grad,) = torch.autograd.grad((losses * losses).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()  # type: ignore[no-untyped-call]
