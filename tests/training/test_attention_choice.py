"""The choice of a kernel by measurement: what is timed, who decides, what a run is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mtk.config import make
from mtk.config.pretrain import PretrainConfig
from mtk.errors import LayoutError
from mtk.models.attention import CAUSAL, EVERYWHERE, Form, sdpa_kernel
from mtk.models.attention_backends import ordered
from mtk.parallel.groups import Group
from mtk.parallel.ranks import Ranks
from mtk.training import attention_choice
from mtk.training.attention_choice import (
    Chosen,
    Work,
    attention_kernel,
    choose,
    forward_and_backward,
    measured,
    order_of_preference,
    random_inputs,
    work_of,
)
from tests.config.test_attention_rules import RUN

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HOPPER = order_of_preference((9, 0))
SMALL = Work(2, 4, 2, 16, 8, torch.float32, CAUSAL)
LLAMA = Work(8, 32, 8, 4096, 128, torch.bfloat16, CAUSAL)


def config(**changes: Any) -> PretrainConfig:
    return make(PretrainConfig, **{**RUN, **changes})


# -- deciding -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "name", "order"),
    [
        ({"cudnn": 1.0, "flash": 2.0, "efficient": 3.0}, "cudnn", "cudnn flash efficient math"),
        # Not clearly faster: noise must not change the kernel.
        ({"cudnn": 1.04, "flash": 1.0, "efficient": 3.0}, "cudnn", "cudnn flash efficient math"),
        ({"cudnn": 1.06, "flash": 1.0, "efficient": 3.0}, "flash", "flash cudnn efficient math"),
        ({"efficient": 0.5, "flash": 1.0}, "efficient", "efficient flash math"),
        # Beside the favourite, not beside each other.
        (
            {"cudnn": 1.5, "flash": 1.02, "efficient": 1.0},
            "efficient",
            "efficient cudnn flash math",
        ),
        ({"efficient": 1.0}, "efficient", "efficient math"),
    ],
)
def test_the_favourite_stays_unless_another_is_clearly_faster(
    seconds: dict[str, float], name: str, order: str
) -> None:
    found = choose(seconds, HOPPER)
    assert (found.backend, found.kernel) == (name, ordered(*order.split()))
    assert found.seconds == seconds


def test_without_a_candidate_torch_chooses() -> None:
    assert choose({}, HOPPER) == Chosen(sdpa_kernel, "sdpa")


def test_the_favourite_is_that_of_the_gpu() -> None:
    assert HOPPER[0] == order_of_preference((10, 0))[0] == "cudnn"
    assert order_of_preference((8, 0))[0] == order_of_preference((8, 9))[0] == "flash"


def test_a_choice_tells_its_figures() -> None:
    assert str(Chosen(sdpa_kernel, "flash")) == "flash"
    found = choose({"flash": 3.44e-3, "cudnn": 1.9e-3}, HOPPER)
    assert str(found) == "cudnn (measured, ms: cudnn 1.9, flash 3.44)"


# -- measuring ----------------------------------------------------------------------------


def test_what_refuses_is_left_out_and_the_median_counts() -> None:
    """cuDNN and the memory-efficient kernel have nothing for the CPU."""
    turns: list[float] = []

    def timer(run: Callable[[], object]) -> float:
        run()
        turns.append(float(len(turns)))
        return turns[-1] ** 2

    before = torch.get_rng_state()
    seconds = measured(SMALL, CPU, ("cudnn", "flash", "efficient", "math"), timer)
    assert seconds == {"flash": 16.0, "math": 25.0}  # of turns 0 2 4 6 8 and 1 3 5 7 9
    assert torch.equal(torch.get_rng_state(), before)


def test_what_the_user_switched_off_is_not_measured() -> None:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert list(measured(SMALL, CPU, ("flash", "math"), lambda run: 1.0)) == ["math"]


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 3),
        ({"form": Form(window=4)}, 3),
        ({"documents": True, "form": EVERYWHERE}, 3),
        ({"bias": True, "form": EVERYWHERE}, 3),
        ({"bias": True, "learned": True, "form": EVERYWHERE}, 4),
        ({"dropout": 0.5}, 3),
    ],
)
def test_the_measured_call_is_that_of_training(changes: dict[str, Any], count: int) -> None:
    values = {name: getattr(SMALL, name) for name in Work.__dataclass_fields__}
    inputs = random_inputs(Work(**(values | changes)), CPU)
    grads = forward_and_backward(sdpa_kernel, inputs)
    assert len(grads) == count and grads[0].shape == (2, 4, 16, 8) and grads[1].shape[1] == 2


def test_large_calls_are_cut_to_some_milliseconds() -> None:
    assert SMALL.within(1e12) == SMALL
    for work in (LLAMA, Work(1, 64, 8, 131072, 128, torch.bfloat16, CAUSAL)):
        cut = work.within(1e12)
        assert cut.flops <= 1.1e12 and cut.heads // cut.groups == work.heads // work.groups
        assert cut.length == work.length or (cut.batch, cut.groups) == (1, 1)
    assert LLAMA.within(1e12).length == 4096


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Work(1, 4, 4, 16, 8, torch.bfloat16, CAUSAL)),
        (
            {"num_query_groups": 2, "window_size": 4, "attention_dropout": 0.1},
            Work(1, 4, 2, 16, 8, torch.bfloat16, Form(window=4), 0.1),
        ),
        (
            {"tensor_model_parallel_size": 2, "nproc": 2, "micro_batch_size": 3},
            Work(3, 2, 2, 16, 8, torch.bfloat16, CAUSAL),
        ),
        (
            {
                "num_query_groups": 1,
                "context_parallel_size": 2,
                "cp_comm_type": "a2a",
                "nproc": 2,
            },
            Work(1, 2, 1, 16, 8, torch.bfloat16, CAUSAL),
        ),
        (
            {"reset_attention_mask": True, "precision": "fp16"},
            Work(1, 4, 4, 16, 8, torch.float16, CAUSAL, documents=True),
        ),
        (
            {"position_embedding_type": "relative"},
            Work(1, 4, 4, 16, 8, torch.bfloat16, EVERYWHERE, bias=True, learned=True),
        ),
        ({"family": "bert"}, Work(1, 4, 4, 16, 8, torch.bfloat16, EVERYWHERE, documents=True)),
    ],
)
def test_the_work_is_that_of_a_rank(changes: dict[str, Any], expected: Work) -> None:
    assert work_of(config(**changes)) == expected


# -- a run --------------------------------------------------------------------------------


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> list[Work]:
    """What was measured on a pretended GPU, where flash attention is the fastest."""
    calls: list[Work] = []

    def pretend(work: Work, *_: Any) -> dict[str, float]:
        calls.append(work)
        return {"cudnn": 2.0, "flash": 1.0}

    monkeypatch.setattr(attention_choice, "measured", pretend)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return calls


def test_auto_measures_on_cuda_only(on_hopper: list[Work]) -> None:
    found = attention_kernel(config(), Ranks(device=CUDA))
    assert found.backend == "flash" and on_hopper == [work_of(config())]
    assert attention_kernel(config(), Ranks()) == Chosen(sdpa_kernel, "sdpa")
    assert len(on_hopper) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"deterministic_mode": True},
        {"attention_backend": "sdpa"},
        {"context_parallel_size": 2, "nproc": 2},
    ],
    ids=str,
)
def test_elsewhere_torch_chooses(changes: dict[str, Any], on_hopper: list[Work]) -> None:
    cp = Group("cp", tuple(range(changes.get("context_parallel_size", 1))))
    found = attention_kernel(config(**changes), Ranks(device=CUDA, cp=cp))
    assert found == Chosen(sdpa_kernel, "sdpa") and on_hopper == []


def test_rank_0_measures_for_all(on_hopper: list[Work], monkeypatch: pytest.MonkeyPatch) -> None:
    shared: list[Any] = []

    def share(value: Any, group: Group, site: str) -> Any:
        shared.append(value)
        return shared[0]

    monkeypatch.setattr(attention_choice, "share_object", share)
    found = [
        attention_kernel(config(), Ranks(device=CUDA, world=Group("world", (0, 1), rank)))
        for rank in (0, 1)
    ]
    assert found[0] == found[1] and found[0].backend == "flash"
    assert len(on_hopper) == 1 and shared == [{"cudnn": 2.0, "flash": 1.0}, {}]


def test_what_was_asked_for_is_taken_or_refused(on_hopper: list[Work]) -> None:
    asked = config(attention_backend="efficient")
    assert attention_kernel(asked, Ranks(device=CUDA)) == Chosen(ordered("efficient"), "efficient")
    with pytest.raises(LayoutError, match="kernels for CUDA only"):
        attention_kernel(asked, Ranks())
    assert on_hopper == []
