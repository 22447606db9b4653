"""Packed documents: one forward pass over a sample equals one for each of its documents."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mtk.config import make
from mtk.config.pretrain import PretrainConfig
from mtk.data.loader import MicroBatch
from mtk.data.packing import Packing
from mtk.errors import ConfigError, LayoutError
from mtk.log import Reporter
from mtk.models.gpt import GPT
from mtk.parallel.ranks import Ranks
from mtk.training.attention_choice import attention_kernel
from mtk.training.batch import GlobalBatch
from mtk.training.data import data_identity, run_data
from mtk.training.evaluate import held_out_loss
from mtk.training.opened_data import open_data
from stages.pretrain import run
from tests.models.sizes import llama_config, small_config, small_model
from tests.training.test_pretrain import BASE, QUIET, config, dataset
from tests.training.test_step import passes, stepper

CPU = torch.device("cpu")
EOD = 96
BOUNDS = (0, 5, 6, 15, 24)  # documents of one sample of 24 tokens; the last one goes on


def sample() -> MicroBatch:
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(0, EOD, (1, 25), generator=generator)
    text[0, [end - 1 for end in BOUNDS[1:-1]]] = EOD
    tokens, labels = text[:, :-1], text[:, 1:]
    packing = Packing(EOD, attention=True, positions=True)
    documents, positions = packing.documents(tokens), packing.position_ids(tokens)
    return MicroBatch(tokens, labels, torch.ones(1, 24), (0,), documents, positions)


def logits(model: GPT, micro: MicroBatch) -> Tensor:
    found: Tensor = model(micro.tokens_BS, micro.positions_BS, documents=micro.documents_BS)
    return found


def alone(micro: MicroBatch) -> list[MicroBatch]:
    """Each document as a sample of its own, without any mask or positions."""
    return [
        MicroBatch(
            micro.tokens_BS[:, start:end],
            micro.labels_BS[:, start:end],
            micro.loss_mask_BS[:, start:end],
            (0,),
        )
        for start, end in pairwise(BOUNDS)
    ]


def models() -> list[Any]:
    return [pytest.param(small_config(), id="learned"), pytest.param(llama_config(), id="rope")]


@pytest.mark.parametrize("sizes", models())
def test_logits_equal_separate_passes(sizes: Any) -> None:
    model = small_model(sizes)
    packed = logits(model, sample())
    separate = torch.cat([logits(model, part) for part in alone(sample())], 1)
    torch.testing.assert_close(packed, separate, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", models())
def test_a_step_equals_one_on_separate_documents(sizes: Any) -> None:
    one, other = stepper(small_model(sizes)), stepper(small_model(sizes))
    together = one.step(GlobalBatch([sample()], samples=1), 0)
    separate = other.step(GlobalBatch(alone(sample()), samples=1), 0)
    assert together.loss.item() == pytest.approx(separate.loss.item(), rel=1e-6)
    assert together.norm.item() == pytest.approx(separate.norm.item(), rel=1e-5)
    # Not the weights: AdamW divides by the gradient's own size, and makes of a rounding error
    # in one that is next to nothing a whole step.
    for name, gradient in one.main.gradients.items():
        expected = other.main.gradients[name]
        assert gradient is not None and expected is not None
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7, msg=name)


def test_evaluation_keeps_documents_apart() -> None:
    model = small_model(llama_config())
    packed = held_out_loss(passes(model), [GlobalBatch([sample()], samples=1)], Ranks(), None)
    separate = held_out_loss(
        passes(model), [GlobalBatch(alone(sample()), samples=1)], Ranks(), None
    )
    assert packed == pytest.approx(separate)


@pytest.mark.parametrize("left_out", ["documents_BS", "positions_BS"])
def test_each_of_the_two_matters(left_out: str) -> None:
    """Positions are learned here: rotary ones are relative, and only the mask matters."""
    model = small_model(small_config(init_method_std=0.3))
    packed = logits(model, sample())
    without = logits(model, dataclasses.replace(sample(), **{left_out: None}))
    assert not torch.allclose(packed, without, atol=1e-3)


def first_batch(folder: Path, eod: int | None, **changes: Any) -> GlobalBatch:
    options = config(folder, **changes)
    data = dataclasses.replace(open_data(options.data), eod=eod)
    return next(run_data(options, data, 40, Reporter(quiet=True)).train(0))


def test_the_options_reach_the_batches(tmp_path: Path) -> None:
    both = {"reset_attention_mask": True, "reset_position_ids": True}
    micro = first_batch(tmp_path, 7, **both).micro_batches[0]
    assert micro.documents_BS is not None and micro.positions_BS is not None
    assert torch.equal(micro.documents_BS, Packing(7, True, True).documents(micro.tokens_BS))
    plain = first_batch(tmp_path, 7).micro_batches[0]
    assert plain.documents_BS is None and plain.positions_BS is None
    with pytest.raises(ConfigError, match=r"(?s)reset_attention_mask.*reset_position_ids"):
        first_batch(tmp_path, None, **both)


def test_trains_and_evaluates_on_mock_data(tmp_path: Path) -> None:
    options: dict[str, Any] = {**BASE, "data_path": [], "split": "969,30,1", "mock_data": True}
    changes = {"reset_attention_mask": True, "reset_position_ids": True, "train_iters": 5}
    artifact = run(make(PretrainConfig, **{**options, **changes, "save": str(tmp_path)}), QUIET)
    assert artifact.metrics["test"]["loss"] > 0


def test_the_identity_of_the_data_names_both(tmp_path: Path) -> None:
    data = open_data(config(tmp_path).data)
    digests = {
        data_identity(config(tmp_path, **changes), data, 40)
        for changes in ({}, {"reset_attention_mask": True}, {"reset_position_ids": True})
    }
    assert len(digests) == 3


def test_a_dataset_without_eods_is_warned_about(tmp_path: Path) -> None:
    warnings: list[str] = []

    class Listener(Reporter):
        def warn(self, message: str) -> None:
            warnings.append(message)

    options = config(tmp_path, reset_attention_mask=True)
    data = open_data(options.data)
    made = dataclasses.replace(
        data.datasets[0], artifact=SimpleNamespace(metrics={"append_eod": False})
    )  # type: ignore[arg-type]
    opened = dataclasses.replace(data, datasets=(made,), eod=7)
    run_data(options, opened, 40, Listener(quiet=True))
    assert len(warnings) == 1 and f"{dataset()} was made without --append-eod" in warnings[0]


def test_flash_attention_is_refused_where_it_has_no_masks(tmp_path: Path) -> None:
    changes = {"attention_dropout": 0.0, "precision": "bf16", "attention_backend": "flash"}
    options = config(tmp_path, reset_attention_mask=True, **changes)
    with pytest.raises(LayoutError, match="reset-attention-mask"):
        attention_kernel(options, Ranks(device=torch.device("cuda")))
    attention_kernel(options, Ranks())
    plain = config(tmp_path, **changes)
    encoder = dataclasses.replace(plain, model=dataclasses.replace(plain.model, family="bert"))
    with pytest.raises(LayoutError, match="padded samples"):
        attention_kernel(encoder, Ranks(device=torch.device("cuda")))
    device = dataclasses.replace(encoder.runtime, device="cuda")
    found = list(dataclasses.replace(encoder, runtime=device).problems())
    assert "padded samples" in " ".join(problem.rule for problem in found)


def test_the_model_takes_positions_of_each_row() -> None:
    """A batch of packed samples equals its rows one by one."""
    model: GPT = small_model(llama_config())
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(90, EOD + 1, (3, 24), generator=generator)
    packing = Packing(EOD, attention=True, positions=True)

    def logits(rows: Tensor) -> Tensor:
        return model(rows, packing.position_ids(rows), documents=packing.documents(rows))

    together = logits(tokens)
    for row in range(3):
        torch.testing.assert_close(together[row], logits(tokens[row : row + 1])[0])
