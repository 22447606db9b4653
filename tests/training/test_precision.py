"""Loss scale and main weights."""

from __future__ import annotations

import torch

from mtk.config import make
from mtk.config.optimization import PrecisionConfig
from mtk.precision.loss_scale import LossScale
from mtk.precision.main_weights import MainWeights
from tests.models.sizes import llama_config, small_model


def scale_config(**changes: object) -> LossScale:
    values = {"precision": "fp16", "initial_loss_scale": 16.0, "loss_scale_window": 3}
    return LossScale.start(make(PrecisionConfig, **(values | changes)))


def after(scale: LossScale, steps: str) -> float:
    for step in steps:
        scale = scale.updated(step == "+")
    return scale.scale


def test_only_fp16_has_a_dynamic_scale() -> None:
    assert not LossScale.start(make(PrecisionConfig, precision="bf16")).dynamic
    assert LossScale.start(make(PrecisionConfig)).scale == 1.0
    fixed = LossScale.start(make(PrecisionConfig, precision="fp16", loss_scale=8.0))
    assert after(fixed, "---+++++") == 8.0


def test_growth_backoff_and_hysteresis() -> None:
    scale = scale_config()
    assert after(scale, "+++") == 32.0
    assert after(scale, "-") == 16.0  # the first bad step is tolerated
    assert after(scale, "--") == 8.0
    assert after(scale, "---") == 4.0  # patience stays spent: each further one halves
    assert after(scale, "-+-") == 8.0  # a good step alone does not restore it
    assert after(scale, "-+++-") == 32.0  # growth does
    assert after(scale, "-" * 40) == 1.0


def test_counters_survive_a_checkpoint() -> None:
    scale = scale_config().updated(False).updated(True)
    restored = scale_config().restored(scale.to_dict())
    assert restored == scale


def test_fp32_main_weights_are_the_parameters() -> None:
    model = small_model(llama_config())
    main = MainWeights(dict(model.named_parameters()), torch.float32)
    assert all(main.weights[name] is p for name, p in model.named_parameters())


def test_bf16_keeps_unrounded_main_weights_and_adds_gradients_in_fp32() -> None:
    config = llama_config()
    model, reference = small_model(config), small_model(config)
    main = MainWeights(dict(model.named_parameters()), torch.bfloat16)
    exact = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(main.weights[name], exact[name])
    assert model.rotary_cos.dtype == torch.float32
    total: dict[str, torch.Tensor] = {}
    for seed in (1, 2, 3):
        x_BS = torch.randint(0, 97, (2, 8), generator=torch.Generator().manual_seed(seed))
        model(x_BS).float().logsumexp(-1).sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            total[name] = total.get(name, torch.zeros(())) + parameter.grad.float()
        main.collect_gradients()
    for name, weight in main.weights.items():
        assert weight.grad is not None and weight.grad.dtype == torch.float32
        assert torch.equal(weight.grad, total[name])
