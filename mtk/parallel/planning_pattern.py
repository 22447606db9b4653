"""Memory of layers that follow a pattern, by formula: parameters and activations of each kind.

Those of a Mamba layer are the terms that its plain PyTorch form keeps for backward, counted
once on real tensors (tests hold the formula to such a count): the convolutions and the gated
norm work in fp32, and the scan keeps a matrix of decays, one of weights and the states of each
chunk. Symbols: s sequence, b micro-batch, t p c as in ``planning``, I channels of all heads,
G x N numbers of B and of C, Q tokens of a chunk, e bytes of an element.
"""

from __future__ import annotations

from mtk.config.mamba import EXPERTS, mamba_sizes
from mtk.config.model import ModelConfig
from mtk.models.count import mlp_matrices
from mtk.models.count_pattern import layer_parameters


def pattern_parameters(model: ModelConfig, kinds: str) -> tuple[int, int]:
    """Of layers of these kinds: (all but experts, experts)."""
    each = (model.num_experts or 0) * mlp_matrices(model, model.moe_ffn_size)
    experts = each * kinds.count(EXPERTS)
    return sum(layer_parameters(model, kind) for kind in kinds) - experts, experts


def mamba_activations(model: ModelConfig, element: int, tp: int) -> float:
    """Bytes a token of all but the scan, its norm and residual left out."""
    sizes = mamba_sizes(model)
    shared = sizes.shared / min(tp, sizes.groups)
    heads = sizes.heads / tp
    return heads * sizes.head * (24 + 3 * element) + shared * (16 + 2 * element) + 9 * heads


def scan_activations(model: ModelConfig, element: int, tp: int) -> float:
    """Bytes a token of the scan itself; what selective recomputation does not keep."""
    sizes = mamba_sizes(model)
    chunk = min(model.mamba_chunk_size, model.seq_length)
    groups, heads = sizes.groups / min(tp, sizes.groups), sizes.heads / tp
    vectors = 4 * heads * sizes.head * element + 2 * groups * sizes.state * element + 40 * heads
    matrices = heads * chunk * (4 + element) + groups * chunk * element
    states = heads * sizes.head * sizes.state / chunk * (4 + element)
    return vectors + matrices + states
