"""Loss, forward step and batches of the user's own, under layouts; logits; text afterwards."""

from __future__ import annotations

import dataclasses
import runpy
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtk.checkpoint import complete_steps
from mtk.config import make
from mtk.config.pretrain import PretrainConfig
from mtk.data.loader import MicroBatch
from mtk.errors import DataError, LayoutError
from mtk.log import Reporter
from mtk.parallel.dims import Dims
from mtk.parallel.pipeline import call_gpt
from mtk.parallel.ranks import Ranks, make_ranks
from mtk.session import Session
from mtk.training.assemble import make_stepper
from mtk.training.batch import GlobalBatch, LocalBatch
from mtk.training.custom import Custom, logits_of
from mtk.training.evaluate import held_out_loss
from mtk.training.loop import RunData
from mtk.training.metrics import read_metrics
from mtk.training.objective import OfTokens, TokenLosses
from mtk.training.step import Stepper
from mtk.verification.observe import random_sample, share
from stages.pretrain import run
from tests.parallel.layouts import configure
from tests.parallel.ranks import run_pretrain, run_ranks

ROOT = Path(__file__).parents[2]
QUIET = Session(Reporter(quiet=True))
KEYWORDS = (3, 5, 8)


@dataclasses.dataclass(frozen=True)
class Heavier:
    """Some labels count three times; a second term keeps logits small."""

    token_losses: TokenLosses
    names: tuple[str, ...] = ("keyword_loss", "size")

    def weights(self, batch: Any) -> tuple[Tensor, ...]:
        heavier = 1.0 + 2.0 * torch.isin(batch.labels_BS, torch.tensor(KEYWORDS))
        given = batch.extra.get("given", 1.0)
        return batch.loss_mask_BS * heavier * given, batch.loss_mask_BS

    def losses(self, outputs: Any, batch: LocalBatch) -> tuple[Tensor, ...]:
        nats = self.token_losses(outputs, batch.labels_BS)
        return nats, 0.1 * nats.square()


def halved(module: nn.Module, received: tuple[Tensor, ...], batch: Any) -> Any:
    """The model's own outputs; of the last stage the half."""
    out = call_gpt(module, received, batch)
    return out / 2 if module.last else out


def own_batches(config: PretrainConfig, rank: int, size: int) -> RunData:
    """The same four samples in every step, dealt out to the ranks."""

    def batches(consumed: int) -> Iterator[GlobalBatch]:
        text = torch.arange(4 * 25).view(4, 25) % 31
        whole = [text[k : k + 1] for k in range(rank, 4, size)]
        for _ in range(consumed, 24, 4):
            micro = [MicroBatch(t[:, :-1], t[:, 1:], torch.ones(1, 24), (0,)) for t in whole]
            given = {"given": torch.arange(24.0)[None]}
            yield GlobalBatch([dataclasses.replace(m, extra=given) for m in micro], samples=4)

    return RunData(batches, None, None, train_samples=24, token_bytes_V=None)


CUSTOM = Custom(Heavier, halved, own_batches, data_digest="four samples")


def config(folder: Path, **changes: Any) -> PretrainConfig:
    values: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "seq_length": 24,
        "vocab_size": 31,
        "make_vocab_size_divisible_by": 8,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "mock_data": True,
        "micro_batch_size": 1,
        "global_batch_size": 4,
        "train_iters": 6,
        "lr": 1e-3,
        "log_interval": 1,
        "eval_iters": 0,
        "device": "cpu",
        "num_threads": 1,
        "plots": False,
        "save": str(folder),
    }
    return make(PretrainConfig, **(values | changes))


def metrics(folder: Path) -> list[tuple[float, ...]]:
    names = ("loss", "keyword_loss", "size", "grad_norm")
    found = read_metrics(folder / "metrics.jsonl")
    return [tuple(r[name] for name in names) for r in found if r["event"] == "train"]


LAYOUTS: list[dict[str, Any]] = [
    {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    {"pipeline_model_parallel_size": 2},
    {"context_parallel_size": 2},
    {"data_parallel_sharding": "full"},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_own_parts_in_every_layout(layout: dict[str, Any], tmp_path: Path) -> None:
    run(config(tmp_path / "one"), QUIET, custom=CUSTOM)
    run_pretrain(config(tmp_path / "two", nproc=2, **layout), CUSTOM)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == 6 and one[-1][0] < one[0][0]
    for alone, together in zip(one, two, strict=True):
        assert together == pytest.approx(alone, rel=1e-5)
    plain = tmp_path / "plain"
    run(config(plain), QUIET)
    first = [r["loss"] for r in read_metrics(plain / "metrics.jsonl") if r["event"] == "train"]
    assert first[0] != pytest.approx(one[0][0], rel=1e-3)


@dataclasses.dataclass(frozen=True)
class Light(Heavier):
    """A mean does not change with the unit of its weights."""

    def weights(self, batch: Any) -> tuple[Tensor, ...]:
        keywords, size = super().weights(batch)
        return 1e-4 * keywords, 1e-4 * size


@pytest.mark.parametrize("objective", [Heavier, Light])
def test_a_term_is_the_formula(objective: type[Heavier]) -> None:
    options = configure()
    sample = random_sample(options)
    stepper = make_stepper(options, 80, Ranks(), objective=objective)
    batch = share(sample, 2, 0, 1)
    logits = torch.cat(logits_of(stepper, batch))
    nats = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), sample.labels_BS.flatten(), reduction="none"
    ).view_as(sample.labels_BS)
    weights = sample.loss_mask_BS * (1 + 2 * torch.isin(sample.labels_BS, torch.tensor(KEYWORDS)))
    expected = (nats * weights).sum() / weights.sum()
    result = stepper.step(batch, 0)
    torch.testing.assert_close(result.terms["keyword_loss"], expected.detach())
    stepper = make_stepper(options, 80, Ranks(), objective=objective)
    held = held_out_loss(stepper.passes, [batch], Ranks(), None)
    assert held["keyword_loss"] == pytest.approx(expected.item(), rel=1e-5)


def too_few(config: PretrainConfig, rank: int, size: int) -> RunData:
    found = own_batches(config, rank, size)
    return dataclasses.replace(found, train=lambda consumed: islice(found.train(consumed), 2))


def another_length(config: PretrainConfig, rank: int, size: int) -> RunData:
    return dataclasses.replace(own_batches(config, rank, size), train_samples=12)


def test_batches_must_last_as_long_as_the_run(tmp_path: Path) -> None:
    own = Custom(batches=too_few, data_digest="two steps")
    with pytest.raises(DataError, match="ended after 8 of 24 samples"):
        run(config(tmp_path / "short"), QUIET, custom=own)
    assert complete_steps(tmp_path / "short") == [2]
    with pytest.raises(DataError, match=r"train_samples = 12, but .* asks for 24"):
        run(config(tmp_path), QUIET, custom=Custom(batches=another_length, data_digest="three"))


def judge(stepper: Stepper, step: int) -> dict[str, Any]:
    """Logits of the model that is being trained."""
    text = torch.arange(24)[None]
    batch = GlobalBatch([MicroBatch(text, text, torch.ones(1, 24), (0,))], samples=1)
    (logits,) = logits_of(stepper, batch)
    return {"shape": list(logits.shape), "at": step}


def judged(config: PretrainConfig, rank: int, size: int) -> RunData:
    return dataclasses.replace(own_batches(config, rank, size), judge=judge)


def test_a_run_hands_out_its_logits(tmp_path: Path) -> None:
    own = Custom(batches=judged, data_digest="judged")
    metrics = run(config(tmp_path), QUIET, custom=own).metrics
    assert metrics["eval"] == {"shape": [1, 24, 31], "at": 6}


def with_bytes(config: PretrainConfig, rank: int, size: int) -> RunData:
    found = own_batches(config, rank, size)
    valid = partial(found.train, 20)
    return dataclasses.replace(found, valid=valid, token_bytes_V=torch.ones(31))


def test_bytes_of_text_belong_to_plain_cross_entropy(tmp_path: Path) -> None:
    for objective, told in ((None, True), (Heavier, False)):
        own = Custom(objective, batches=with_bytes, data_digest="bytes")
        metrics = run(config(tmp_path / str(told)), QUIET, custom=own).metrics
        assert ("bits_per_byte" in metrics["eval"]) == told


def _logits(rank: int, options: PretrainConfig, whole: Tensor) -> None:
    ranks = make_ranks(
        Dims.of(options.parallel, 2), rank=rank, device=torch.device("cpu"), kv_groups=2
    )
    stepper = make_stepper(options, 80, ranks)
    found = logits_of(stepper, share(random_sample(options), 2, ranks.dp.rank, ranks.dp.size))
    if options.parallel.pipeline_model_parallel_size == 2 and rank == 0:
        assert found == []
        return
    torch.testing.assert_close(torch.cat(found), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["tensor_model_parallel_size", "pipeline_model_parallel_size"])
def test_logits_come_back_whole(name: str) -> None:
    options = configure()
    alone = make_stepper(options, 80, Ranks())
    whole = torch.cat(logits_of(alone, share(random_sample(options), 2, 0, 1)))
    assert whole.shape == (8, 16, 61)
    run_ranks(2, _logits, configure("gpt2", 2, **{name: 2}), whole)


def test_parts_that_ranks_cannot_import(tmp_path: Path) -> None:
    inside = Custom(objective=lambda losses: Heavier(losses))
    with pytest.raises(TypeError, match="top of a module"):
        run(config(tmp_path / "run", nproc=2), QUIET, custom=inside)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="belong together"):
        Custom(batches=own_batches)


def test_the_example_is_a_program() -> None:
    names = runpy.run_path(str(ROOT / "examples" / "keyword_loss.py"))
    loss = names["KeywordLoss"](lambda logits, labels: logits[..., 0])
    labels = torch.tensor([[17, 1]])
    batch = LocalBatch(labels, labels, torch.tensor([[1.0, 0.0]]), None, None)
    assert loss.weights(batch)[0].tolist() == [[5.0, 0.0]]


@dataclasses.dataclass(frozen=True)
class OfSamples(Heavier):
    def weights(self, batch: Any) -> tuple[Tensor, ...]:
        return torch.ones(1), batch.loss_mask_BS


def test_losses_of_samples_are_refused_where_ranks_share_a_sample() -> None:
    batch = LocalBatch(torch.ones(1, 4), torch.ones(1, 4), torch.ones(1, 4), None, None)
    assert OfTokens(Heavier(torch.sub)).weights(batch)[1].sum() == 4
    with pytest.raises(LayoutError, match="keyword_loss is no loss of tokens"):
        OfTokens(OfSamples(torch.sub)).weights(batch)
