"""Triton's kernels beside the plain versions that they must equal."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mtk.models.linear_loss import linear_losses
from mtk.models.linear_loss import row_statistics as cpu_statistics
from mtk.models.linear_loss import subtract_ as cpu_subtract_
from mtk.precision.float8_casts import ACTIVATIONS, GATED, FusedCasts, PlainCasts, limit

FORMATS = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "columns", "used"), [(3, 17, 17), (65, 5000, 4990), (9, 50304, 50257)]
)
def test_cross_entropy(dtype: torch.dtype, rows: int, columns: int, used: int) -> None:
    from mtk.kernels.cross_entropy import softmax_minus_target_

    torch.manual_seed(0)
    logits = (torch.randn(rows, columns, device="cuda") * 3).to(dtype)
    labels = torch.randint(used, (rows,), device="cuda")
    counted = logits[:, :used].double()
    expected = F.cross_entropy(counted, labels, reduction="none")
    delta = counted.softmax(-1)
    delta[torch.arange(rows), labels] -= 1
    found = softmax_minus_target_(logits, labels, used)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    bound = 1e-6 if dtype == torch.float32 else 4e-3
    assert (logits[:, :used].double() - delta).abs().max() < bound
    assert not logits[:, used:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_of_a_part_of_the_vocabulary(dtype: torch.dtype) -> None:
    """As plain PyTorch does it, with labels on both sides of the part and none of it used."""
    from mtk.kernels.cross_entropy import row_statistics, subtract_

    torch.manual_seed(0)
    logits = (torch.randn(64, 3000, device="cuda") * 3).to(dtype)
    labels = torch.randint(-1, 3000, (64,), device="cuda")
    labels[:2] = -1
    on_cpu, cpu_labels = logits.cpu(), labels.cpu()
    for used in (2990, 0):
        found, expected = logits.clone(), on_cpu.clone()
        own, plain = row_statistics(found, labels, used), cpu_statistics(expected, cpu_labels, used)
        for one, other in zip(own, plain, strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=1e-5)
        log_sum = plain[0] + plain[1].clamp(min=1e-30).log()
        subtract_(found, labels, log_sum.cuda(), used)
        cpu_subtract_(expected, cpu_labels, log_sum, used)
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-2, atol=1e-5)


def test_labels_outside_of_the_row() -> None:
    """They are not read: no loss and no gradient for -100, NaN for others."""
    from mtk.kernels.cross_entropy import softmax_minus_target_

    logits = torch.randn(4, 300, device="cuda")
    softmax = logits[:, :296].softmax(-1)
    labels = torch.tensor([3, -100, 298, 10**12], device="cuda")
    losses = softmax_minus_target_(logits, labels, 296)
    assert losses.isnan().tolist() == [False, False, True, True]
    assert losses[1] == 0 and not logits[1].any()
    torch.testing.assert_close(losses[0], -softmax[0, 3].log(), rtol=1e-5, atol=1e-5)


def test_cross_entropy_keeps_nan() -> None:
    from mtk.kernels.cross_entropy import softmax_minus_target_

    logits = torch.zeros(2, 300, device="cuda")
    logits[1, 7] = float("nan")
    labels = torch.zeros(2, dtype=torch.int64, device="cuda")
    assert softmax_minus_target_(logits, labels, 300).isnan().tolist() == [False, True]


@pytest.mark.parametrize("chunk", [None, 100])
def test_losses_in_bf16(chunk: int | None) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 128, 64, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(1000, 64, device="cuda") / 8).bfloat16().requires_grad_()
    labels, upstream = (
        torch.randint(990, (2, 128), device="cuda"),
        torch.rand(2, 128, device="cuda"),
    )
    wide = [x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    logits = (wide[0] @ wide[1].t())[..., :990].flatten(0, 1)
    expected = F.cross_entropy(logits, labels.flatten(), reduction="none").view_as(labels)
    exact = torch.autograd.grad((expected * upstream).sum(), wide)
    losses = linear_losses(x, weight, labels, 990, chunk)
    # Logits of up to 8 are rounded by up to 2^-6 in bf16.
    assert (losses - expected).abs().max() < 2**-5
    for one, other in zip(
        torch.autograd.grad((losses * upstream).sum(), (x, weight)), exact, strict=True
    ):
        assert (one.double() - other).norm() < 1e-2 * other.norm()


def compare(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    """Rows, turned, magnitude, sums. A value between two numbers of FP8 may go either way."""
    step = 0.26 if found[0].dtype == torch.float8_e5m2 else 0.13
    for one, other in zip(found[:2], expected[:2], strict=True):
        a, b = one.float(), other.float()
        assert not a.isnan().any()
        assert (a != b).float().mean() < 1e-2
        assert bool(((a - b).abs() <= step * b.abs() + 1e-2).all())
    torch.testing.assert_close(found[2], expected[2], rtol=1e-2, atol=0)
    assert torch.equal(found[0].float().t(), found[1].float())
    if len(found) > 3:
        torch.testing.assert_close(found[3].sum(0), expected[3].sum(0), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (1000, 272), (512, 1024)])
def test_casts(dtype: torch.dtype, rows: int, columns: int) -> None:
    torch.manual_seed(0)
    x, scale = torch.randn(rows, columns, device="cuda").bfloat16(), torch.tensor(50.0).cuda()
    plain, fused = PlainCasts(), FusedCasts()
    compare(fused.cast(x, scale, dtype), plain.cast(x, scale, dtype))
    for kind in ACTIVATIONS:
        width = 2 * columns if kind in GATED else columns
        inner = torch.randn(rows, width, device="cuda").bfloat16()
        compare(
            fused.activate(inner, scale, dtype, kind), plain.activate(inner, scale, dtype, kind)
        )
        both = [c.activate_backward(x, inner, scale, dtype, kind) for c in (fused, plain)]
        compare(both[0], both[1])


@pytest.mark.parametrize("dtype", FORMATS)
def test_casts_saturate_and_keep_nan(dtype: torch.dtype) -> None:
    x = torch.full((64, 64), 2.0, device="cuda").bfloat16()
    x[0, 0] = float("nan")
    rows, turned, _ = FusedCasts().cast(x, torch.tensor(1e9).cuda(), dtype)
    assert rows.float()[0, 0].isnan() and turned.float()[0, 0].isnan()
    assert bool((rows.float()[1:] == limit(dtype)).all())
