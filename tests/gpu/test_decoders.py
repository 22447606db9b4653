"""Windows, biases on scores and norms of heads on CUDA, beside the CPU in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mtk.models import attention
from mtk.models.attention import Form, reference_kernel
from tests.models.sizes import llama_config, small_config, small_model
from tests.models.test_gpt import VARIANTS

LONG: dict[str, Any] = {"seq_length": 48, "kv_channels": 64, "hidden_size": 64}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_equals_the_cpu(changes: dict[str, Any]) -> None:
    model = small_model(small_config(**LONG | changes))
    x_BS = torch.arange(40).view(1, 40)
    expected = model(x_BS)
    found = model.cuda()(x_BS.cuda()).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["window", "bias"])
def test_masks_and_groups_run_fused(kind: str) -> None:
    """No kernel that keeps scores takes part."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 96, 64, generator=generator) for h in (8, 2, 2))
    form = Form(window=17) if kind == "window" else Form(causal=False)
    bias = torch.randn(1, 8, 96, 96, generator=generator) if kind == "bias" else None
    wide = None if bias is None else bias.bfloat16().float()
    rounded = [x.bfloat16().float() for x in (q, k, v)]
    expected = reference_kernel(*rounded, mask=None, dropout=0.0, form=form, bias=wide)
    moved = [x.bfloat16().cuda().requires_grad_() for x in (q, k, v)]
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
        found = attention.sdpa_kernel(
            *moved,
            mask=None,
            dropout=0.0,
            form=form,
            bias=None if bias is None else bias.bfloat16().cuda(),
        )
        found.sum().backward()
    assert (found.float().cpu() - expected).abs().max() <= 2e-2 * expected.abs().max()


# The compiler's own imports and lowerings warn.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_windowed_model_compiles() -> None:
    config = llama_config(**LONG, window_size=9, qk_layernorm=True)
    losses = []
    for compiled in (False, True):
        model = small_model(config).cuda().bfloat16()
        for block in model.layers.values():
            if compiled:
                block.compile(dynamic=False)
        loss = model(torch.arange(48).cuda().view(1, 48)).float().square().mean()
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
