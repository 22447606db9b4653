"""The chunk kernels of context parallelism on one CUDA device, the ranks simulated in turn."""

from __future__ import annotations

import pytest
import torch

from mtk.models.attention import reference_kernel
from mtk.parallel.context_chunks import ChunkKernel, MathChunks
from mtk.parallel.context_fused import CudnnChunks, FlashChunks, chunk_kernel
from tests.parallel.attention_cases import HEADS, Case, errors, make_case, whole
from tests.parallel.context_in_one_process import gathered, ring

FUSED = {"cudnn": CudnnChunks(), "flash": FlashChunks()}
# Relative to the greatest value; the rounding of inputs, probabilities and outputs.
CLOSE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}


def exact(case: Case) -> list[torch.Tensor]:
    """The formula in fp32 on the same (rounded) numbers."""
    wide = [x.float() for x in (case.q, case.k, case.v, case.grad)]
    return whole(Case(*wide, case.documents), reference_kernel)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("chunks", FUSED.values(), ids=FUSED.keys())
def test_fused_chunks_equal_whole_sequences(
    chunks: ChunkKernel, heads: tuple[int, int], channels: int, dtype: torch.dtype
) -> None:
    for cp, chunk in ((2, 128), (4, 37)):  # also chunks that fill no tile
        case = make_case(heads, 2 * cp * chunk, dtype=dtype, channels=channels, device="cuda")
        wanted = exact(case)
        for simulated in (ring, gathered):
            assert max(errors(simulated(case, cp, chunks), wanted)) <= CLOSE[dtype]


@pytest.mark.parametrize("documents", [False, True])
def test_the_formula_is_exact_in_fp32(documents: bool) -> None:
    case = make_case((12, 3), 256, documents=documents, channels=64, device="cuda")
    output, *gradients = errors(ring(case, 4, MathChunks()), exact(case))
    assert output <= 1e-6 and max(gradients) <= 1e-5


def test_documents_in_bf16() -> None:
    case = make_case((12, 3), 512, documents=True, dtype=torch.bfloat16, channels=64, device="cuda")
    assert max(errors(ring(case, 2, MathChunks()), exact(case))) <= CLOSE[torch.bfloat16]


def test_fused_kernels_agree_on_the_log_sum_exp() -> None:
    case = make_case((12, 3), 256, dtype=torch.bfloat16, channels=64, device="cuda")
    for causal in (False, True):
        wanted = MathChunks().forward(case.q, case.k, case.v, causal, None)[1]
        for chunks in FUSED.values():
            _, lse = chunks.forward(case.q, case.k, case.v, causal, None)
            assert lse.dtype == torch.float32
            torch.testing.assert_close(lse, wanted, rtol=1e-3, atol=1e-2)


def test_a_wrong_log_sum_exp_would_be_noticed() -> None:
    class BaseTwo(FlashChunks):
        def forward(self, *args: object) -> tuple[torch.Tensor, torch.Tensor]:
            out, lse = super().forward(*args)  # type: ignore[arg-type]
            return out, lse / torch.log(torch.tensor(2.0))

    case = make_case((12, 3), 512, dtype=torch.bfloat16, channels=64, device="cuda")
    assert max(errors(ring(case, 2, BaseTwo()), exact(case))) > 5 * CLOSE[torch.bfloat16]


def test_the_choice_on_cuda() -> None:
    x = torch.zeros(1, 4, 64, 64, device="cuda", dtype=torch.bfloat16)
    assert isinstance(chunk_kernel(x, x, x, documents=False), CudnnChunks)
    assert isinstance(chunk_kernel(x, x[:, :2], x[:, :2], documents=False), CudnnChunks)
    assert isinstance(chunk_kernel(x, x, x, documents=True), MathChunks)
    wide = x.float()
    assert isinstance(chunk_kernel(wide, wide, wide, documents=False), MathChunks)
    odd = x[..., :60]
    assert isinstance(chunk_kernel(odd, odd, odd, documents=False), MathChunks)
    torch.use_deterministic_algorithms(True)
    try:
        assert isinstance(chunk_kernel(x, x, x, documents=False), FlashChunks)
    finally:
        torch.use_deterministic_algorithms(False)
