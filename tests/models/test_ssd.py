"""The chunked scan against the recurrence: values, gradients, states, documents."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from mtk.models import causal_conv
from mtk.models.causal_conv import convolve
from mtk.models.mamba import GatedNorm
from mtk.models.ssd import chunked, recurrent

BATCH, HEADS, WIDTH, GROUPS, STATE = 2, 6, 5, 2, 7


def inputs(length: int, seed: int = 0, rate: float = 16.0) -> list[Tensor]:
    """x, dt, a, b, c, skip."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.empty(shape).normal_(generator=generator).requires_grad_()

    x, b, c = (
        draw(BATCH, length, *size) for size in ((HEADS, WIDTH), (GROUPS, STATE), (GROUPS, STATE))
    )
    dt = torch.empty(BATCH, length, HEADS).uniform_(0.001, 0.5, generator=generator)
    a = -torch.empty(HEADS).uniform_(0.1, rate, generator=generator)
    return [x, dt.requires_grad_(), a.requires_grad_(), b, c, draw(HEADS)]


def state() -> Tensor:
    generator = torch.Generator().manual_seed(9)
    shape = (BATCH, HEADS, WIDTH, STATE)
    return torch.empty(shape).normal_(generator=generator).requires_grad_()


def both(given: list[Tensor], chunk: int, **options: Any) -> None:
    """Outputs, last states and every gradient agree."""
    wanted = [x for x in (*given, options.get("state")) if x is not None]
    found = []
    for scan in (chunked, recurrent):
        y, last = scan(*given, chunk=chunk, **options)
        weight = torch.arange(y.numel()).view_as(y).sin()
        loss = (y * weight).sum() + (last * last.detach().cos()).sum()
        found.append((y, last, *torch.autograd.grad(loss, wanted)))
    for mine, reference in zip(*found, strict=True):
        # Nothing decays before the first token: that gradient is zero.
        scale = reference.abs().max().clamp(min=1e-6)
        assert (mine - reference).abs().max() / scale < 1e-5


@pytest.mark.parametrize("length", [1, 7, 8, 9, 37, 64])
@pytest.mark.parametrize("chunk", [1, 8, 200])
def test_any_length_and_chunk(length: int, chunk: int) -> None:
    both(inputs(length), chunk)


@pytest.mark.parametrize("length", [1, 8, 21])
def test_a_state_is_taken_over(length: int) -> None:
    both(inputs(length), 8, state=state())


@pytest.mark.parametrize("chunk", [4, 8, 64])
@pytest.mark.parametrize("seed", range(3))
def test_documents_in_chunks(chunk: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    documents = (torch.rand(BATCH, 37, generator=generator) < 0.15).cumsum(1)
    both(inputs(37), chunk, documents_BS=documents)


@pytest.mark.parametrize("chunk", [5, 8, 64])
def test_documents_equal_separate_passes(chunk: int) -> None:
    """Ends inside chunks, at their edges, after one token, in the padding of the last."""
    bounds = (0, 1, 8, 16, 19, 40, 41, 43)
    given = inputs(43)
    documents = torch.zeros(BATCH, 43, dtype=torch.int64)
    for number, (start, end) in enumerate(pairwise(bounds)):
        documents[:, start:end] = (7 * number) % 5  # neighbours differ, others need not
    packed, last = chunked(*given, chunk=chunk, documents_BS=documents)
    for start, end in pairwise(bounds):
        part = [x if x.ndim == 1 else x[:, start:end] for x in given]
        alone, alone_last = chunked(*part, chunk=chunk)
        torch.testing.assert_close(packed[:, start:end], alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, alone_last, rtol=1e-5, atol=1e-6)


def test_fast_decay_keeps_its_accuracy() -> None:
    """Sums of logarithms reach -4000 in a chunk; in fp32 their differences would be noise."""
    given = inputs(256, rate=100.0)
    x, dt, a, b, c, skip = (x.detach().double() for x in given)
    y, _ = chunked(*given, chunk=256)
    held = torch.zeros(BATCH, HEADS, WIDTH, STATE, dtype=torch.float64)
    exact = []
    for t in range(256):
        of_heads = (torch.arange(HEADS) // (HEADS // GROUPS)).tolist()
        taken = torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], b[:, t, of_heads])
        held = (dt[:, t] * a).exp()[..., None, None] * held + taken
        read = torch.einsum("bhpn,bhn->bhp", held, c[:, t, of_heads])
        exact.append(read + skip[:, None] * x[:, t])
    reference = torch.stack(exact, dim=1)
    assert (y - reference).abs().max() / reference.abs().max() < 2e-6


def test_low_precision_keeps_states_in_fp32() -> None:
    given = inputs(32)
    low = [x.detach().bfloat16() if x.ndim == 4 else x.detach() for x in given]
    y, last = chunked(*low, chunk=8)
    same = [x.float() for x in low]
    reference, reference_last = recurrent(*same, chunk=1)
    assert y.dtype == torch.bfloat16 and last.dtype == torch.float32
    assert (y - reference).abs().max() / reference.abs().max() < 2e-2
    assert (last - reference_last).abs().max() / reference_last.abs().max() < 2e-2


def test_the_recurrence_is_the_formula() -> None:
    """One head and one channel, written out."""
    x, dt, a, b, c, skip = (t[:1] if t.ndim > 1 else t for t in inputs(4))
    held = torch.zeros(STATE)
    y, _ = recurrent(x, dt, a, b, c, skip)
    for t in range(4):
        held = (dt[0, t, 4] * a[4]).exp() * held + dt[0, t, 4] * x[0, t, 4, 2] * b[0, t, 1]
        expected = held @ c[0, t, 1] + skip[4] * x[0, t, 4, 2]
        torch.testing.assert_close(y[0, t, 4, 2], expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_convolution_is_torchs(bias: bool, length: int) -> None:
    torch.manual_seed(0)
    x, weight, offset = torch.randn(2, length, 6), torch.randn(6, 4), torch.randn(6)
    own = convolve(x, weight, offset if bias else None)
    theirs = torch.nn.functional.conv1d(
        x.transpose(1, 2), weight[:, None], offset if bias else None, padding=3, groups=6
    )[..., :length]
    expected = torch.nn.functional.silu(theirs).transpose(1, 2)
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)
    # From the middle on, with what stood before.
    before = causal_conv.with_inputs_before(x, 4, None)[:, 1:4]
    torch.testing.assert_close(convolve(x[:, 1:], weight, None, before=before),
                               convolve(x, weight, None)[:, 1:], rtol=1e-5, atol=1e-6)  # fmt: skip


def test_convolution_stays_in_its_document() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 9, 3), torch.randn(3, 4)
    documents = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0, 0]])
    packed = convolve(x, weight, None, documents_BS=documents)
    alone = [convolve(x[:, a:b], weight, None) for a, b in ((0, 2), (2, 7), (7, 9))]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1))


def test_gated_norm_is_of_each_group() -> None:
    torch.manual_seed(0)
    norm = GatedNorm(12, 3, 1e-5)
    x, gate = torch.randn(2, 12), torch.randn(2, 12)
    gated = (x * torch.nn.functional.silu(gate)).view(2, 3, 4)
    expected = gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x, gate), expected.view(2, 12))
