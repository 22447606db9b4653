"""Loss scale and main weights."""

from __future__ import annotations

import pytest
import torch

from mtk.config import make
from mtk.config.optimization import PrecisionConfig
from mtk.models.gpt import GPT
from mtk.parallel.grads import total_norm
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


def backward(model: GPT, seed: int) -> dict[str, torch.Tensor]:
    """Gradients of the model's parameters for random tokens."""
    x_BS = torch.randint(0, 97, (2, 8), generator=torch.Generator().manual_seed(seed))
    model(x_BS).float().logsumexp(-1).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


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
        for name, gradient in backward(model, seed).items():
            total[name] = total.get(name, torch.zeros(())) + gradient.float()
        main.collect_gradients()
    for name, gradient in main.gradients.items():
        assert gradient is not None and gradient.dtype == torch.float32
        assert torch.equal(gradient, total[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_one_micro_batch_are_not_copied(dtype: torch.dtype) -> None:
    model = small_model(llama_config())
    main = MainWeights(dict(model.named_parameters()), dtype)
    for _ in range(2):
        found = {n: (g.data_ptr(), g.dtype) for n, g in backward(model, 1).items()}
        main.collect_gradients()
        taken = {n: g for n, g in main.gradients.items() if g is not None}
        assert {n: (g.data_ptr(), g.dtype) for n, g in taken.items()} == found
        assert list(main.gradients) == list(main.weights)
        main.clear_gradients()
        assert all(gradient is None for gradient in main.gradients.values())
        assert all(parameter.grad is None for parameter in model.parameters())


def test_fp32_gradients_of_several_micro_batches_are_added_in_place() -> None:
    model = small_model(llama_config())
    main = MainWeights(dict(model.named_parameters()), torch.float32)
    first = {name: gradient.clone() for name, gradient in backward(model, 1).items()}
    main.collect_gradients()
    places = [g.data_ptr() for g in main.gradients.values() if g is not None]
    backward(model, 2)
    main.collect_gradients()
    other = small_model(llama_config())
    for name, second in backward(other, 2).items():
        gradient = main.gradients[name]
        assert gradient is not None and torch.equal(gradient, first[name] + second)
    assert [g.data_ptr() for g in main.gradients.values() if g is not None] == places


def test_norms_of_bf16_gradients_are_fp32() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = (7, 1, 5000, 0, 64)
    exact = [torch.randn(size, generator=generator) for size in sizes]
    mixed = [x if index % 2 else x.bfloat16() for index, x in enumerate(exact)]
    wide = [x.float() for x in mixed]
    norm = total_norm(mixed, torch.device("cpu"))
    assert norm.dtype == torch.float32
    # As torch's own is of the same values in fp32, bit for bit.
    assert torch.equal(norm, torch.nn.utils.get_total_norm(wide))
    assert norm.item() == pytest.approx(torch.cat(wide).double().norm().item(), rel=1e-6)


def test_one_bad_weight_is_found() -> None:
    model = small_model(llama_config())
    main = MainWeights(dict(model.named_parameters()), torch.bfloat16)
    assert main.finite() and MainWeights({}, torch.float32).finite()
    with torch.no_grad():
        main.weights["final_norm.weight"][3] = torch.nan
    assert not main.finite()
