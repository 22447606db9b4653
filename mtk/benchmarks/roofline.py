"""What a step's matrix products and attention take alone: the time that no training on this
device gets below, as long as it computes the same.

Each product is timed by itself, on random data and for long enough that a GPU's clock settles
under the load, and counted as often as a step has it. Attention is the faster of PyTorch's
fused kernels, forward and backward each.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mtk.config.bench import TrainBenchConfig
from mtk.config.model import ModelConfig
from mtk.config.pretrain import PretrainConfig
from mtk.launch.process import Place
from mtk.precision.main_weights import COMPUTE_DTYPES

PASSES = ("forward", "input gradient", "weight gradient")
# Seconds for which a product is repeated.
SUSTAINED = {"cuda": 0.15, "cpu": 0.01}
FUSED = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Product:
    """[rows, inner] x [inner, columns], ``count`` times a micro-batch. experts: matrices that
    share the rows (forward, input gradient) or the inner dimension (weight gradient)."""

    name: str
    kind: str
    rows: int
    columns: int
    inner: int
    count: int
    experts: int = 1

    @property
    def flops(self) -> float:
        """Of all ``count`` together."""
        return 2.0 * self.rows * self.columns * self.inner * self.count

    @property
    def shape(self) -> tuple[str, int, int, int, int]:
        """What decides how long it takes."""
        return self.kind, self.rows, self.columns, self.inner, self.experts


@dataclass(frozen=True)
class AttentionShape:
    """Causal attention, ``count`` times a micro-batch."""

    batch: int
    heads: int
    groups: int
    length: int
    head: int
    count: int

    @property
    def flops(self) -> float:
        """Of forward and backward, counted in full: 2 and 4 products of the square."""
        square = 2.0 * self.batch * self.heads * self.length**2 * self.head
        return 6.0 * square * self.count


@dataclass(frozen=True)
class Part:
    """seconds: of one; count: in a step."""

    name: str
    kind: str
    seconds: float
    count: int
    flops: float


@dataclass(frozen=True)
class Roofline:
    """seconds: of a step. products: the format they were timed in. kernels: which of the fused
    ones were the faster, forward and backward."""

    seconds: float
    products: str
    kernels: dict[str, str]
    parts: Sequence[Part]


def not_counted(config: PretrainConfig) -> str:
    """Why there is no list of products for this training; "" where there is one."""
    model = config.model
    options = {
        f"family {model.family}": model.family != "gpt",
        "patterns of layers": model.hybrid_layer_pattern is not None,
        "windows": model.window_size is not None,
        "biases on scores": model.biases_scores,
        "adapters": model.lora.lora_rank is not None,
        "models that are shared by ranks": config.parallel.model_parallel_size > 1
        or config.parallel.expert_model_parallel_size > 1,
    }
    missing = [name for name, found in options.items() if found]
    return f"not written for {', '.join(missing)}" if missing else ""


def products_of(model: ModelConfig, samples: int) -> list[Product]:
    """All matrix products of forward and backward for a micro-batch of ``samples``."""
    return [
        product
        for name, outputs, inputs, count, chosen in _matrices(model)
        for product in _three(name, outputs, inputs, count, samples * model.seq_length, chosen)
    ]


def attention_of(model: ModelConfig, samples: int) -> AttentionShape:
    """Of a micro-batch of ``samples``."""
    return AttentionShape(
        samples,
        model.num_attention_heads,
        model.query_groups,
        model.seq_length,
        model.head_size,
        model.num_layers,
    )


# (experts, of these for each token); (1, 1) for what all tokens go through.
Chosen = tuple[int, int]


def _matrices(model: ModelConfig) -> Iterator[tuple[str, int, int, int, Chosen]]:
    """Name, outputs, inputs, how many there are, and experts."""
    hidden, one = model.hidden_size, (1, 1)
    queries, keys = (
        model.num_attention_heads * model.head_size,
        model.query_groups * model.head_size,
    )
    layers, sparse = model.num_layers, model.moe_layers
    yield "query", queries, hidden, layers, one
    yield "key", keys, hidden, layers, one
    yield "value", keys, hidden, layers, one
    yield "attention output", hidden, queries, layers, one
    yield from _mlp(model, "MLP", model.ffn_size, layers - sparse, one)
    if sparse and model.num_experts:
        yield "router", model.num_experts, hidden, sparse, one
        chosen = (model.num_experts, model.moe_router_topk)
        yield from _mlp(model, "expert", model.moe_ffn_size, sparse, chosen)
        shared = model.moe_shared_expert_intermediate_size
        if shared is not None:
            yield from _mlp(model, "shared expert", shared, sparse, one)
            if model.moe_shared_expert_gate:
                yield "shared expert gate of tokens", 1, hidden, sparse, one
    yield "output head", model.padded_vocab_size, hidden, 1, one


def _mlp(
    model: ModelConfig, name: str, width: int, count: int, chosen: Chosen
) -> Iterator[tuple[str, int, int, int, Chosen]]:
    if not count:
        return
    for part in ("up", "gate") if model.gated else ("up",):
        yield f"{name} {part}", width, model.hidden_size, count, chosen
    yield f"{name} down", model.hidden_size, width, count, chosen


def _three(
    name: str, outputs: int, inputs: int, count: int, tokens: int, chosen: Chosen
) -> list[Product]:
    """The products of a linear layer: y = x W^T, dx = dy W, dW = dy^T x."""
    experts, topk = chosen
    rows = tokens * topk
    return [
        Product(name, PASSES[0], rows, outputs, inputs, count, experts),
        Product(name, PASSES[1], rows, inputs, outputs, count, experts),
        Product(name, PASSES[2], outputs, inputs, rows, count, experts),
    ]


# -- times --------------------------------------------------------------------------------


def measure_roofline(place: Place, config: TrainBenchConfig) -> Roofline:
    """Of a step of one rank; for ``launch``, on one. The vocabulary must be known."""
    if config.runtime.num_threads is not None:
        torch.set_num_threads(config.runtime.num_threads)
    micro, precision = config.batch.micro_batch_size, config.precision.precision
    batches = config.batch.full // (micro * config.data_parallel_size)
    dtype, attention = COMPUTE_DTYPES[precision], attention_of(config.model, micro)
    parts = _product_parts(products_of(config.model, micro), batches, dtype, place.device)
    more, kernels = _attention_parts(attention, batches, dtype, place.device)
    parts += more
    seconds = sum(part.seconds * part.count for part in parts)
    return Roofline(seconds, precision, kernels, parts)


def _product_parts(
    products: Sequence[Product], batches: int, dtype: torch.dtype, device: torch.device
) -> list[Part]:
    times: dict[tuple[Any, ...], float] = {}
    for product in products:
        if product.shape not in times:
            times[product.shape] = sustained(_call(product, dtype, device), device)
    return [
        Part(p.name, p.kind, times[p.shape], p.count * batches, p.flops * batches) for p in products
    ]


def _call(product: Product, dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """The product with operands laid out as in training."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    rows, columns, inner, experts = product.rows, product.columns, product.inner, product.experts
    forward, _, weight = PASSES
    if experts > 1:
        return _grouped(product, random, device)
    a = random(inner, rows).T if product.kind == weight else random(rows, inner)
    b = random(columns, inner).T if product.kind == forward else random(inner, columns)
    out = random(rows, columns)
    return lambda: torch.mm(a, b, out=out)


def _grouped(
    product: Product, random: Callable[..., Tensor], device: torch.device
) -> Callable[[], Tensor]:
    """Experts with equally many tokens each."""
    rows, columns, inner, experts = product.rows, product.columns, product.inner, product.experts
    forward, _, weight = PASSES
    shared = inner if product.kind == weight else rows
    ends = [shared * (k + 1) // experts for k in range(experts)]
    offsets = torch.tensor(ends, dtype=torch.int32, device=device)
    if product.kind == weight:
        a, b = random(inner, rows).T, random(inner, columns)
    elif product.kind == forward:
        a, b = random(rows, inner), random(experts, columns, inner).transpose(1, 2)
    else:
        a, b = random(rows, inner), random(experts, inner, columns)
    return lambda: F.grouped_mm(a, b, offs=offsets)


def _attention_parts(
    shape: AttentionShape, batches: int, dtype: torch.dtype, device: torch.device
) -> tuple[list[Part], dict[str, str]]:
    """Forward and backward, each by the kernel that is the faster one of all."""
    candidates: dict[str, Any] = FUSED if device.type == "cuda" else {"default": None}
    found: dict[str, tuple[float, float]] = {}
    for name, backend in candidates.items():
        try:
            found[name] = _attention_times(shape, backend, dtype, device)
        except RuntimeError:  # this kernel does not take these sizes or this format
            continue
    parts, kernels = [], {}
    count = shape.count * batches
    for index, (kind, share) in enumerate((("forward", 1 / 3), ("backward", 2 / 3))):
        name = min(found, key=lambda name, index=index: found[name][index])  # type: ignore[misc]
        kernels[kind] = name
        flops = shape.flops * batches * share
        parts.append(Part("attention", kind, found[name][index], count, flops))
    return parts, kernels


def _attention_times(
    shape: AttentionShape, backend: SDPBackend | None, dtype: torch.dtype, device: torch.device
) -> tuple[float, float]:
    """Seconds of forward and of backward. Raises RuntimeError where the kernel cannot."""

    def random(heads: int) -> Tensor:
        size = (shape.batch, shape.length, heads, shape.head)
        made = torch.randn(size, dtype=dtype, device=device).transpose(1, 2)
        return made.requires_grad_()

    q, k, v = random(shape.heads), random(shape.groups), random(shape.groups)
    grad = torch.randn_like(q)
    grouped = shape.heads != shape.groups

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

    chosen: AbstractContextManager[Any] = nullcontext() if backend is None else sdpa_kernel(backend)
    with warnings.catch_warnings(), chosen:
        warnings.simplefilter("ignore")  # why a kernel cannot
        out = forward()
        times = sustained(forward, device)
        back = sustained(
            lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True), device
        )
    return times, back


def sustained(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one ``call``, repeated without a pause for at least the span in ``SUSTAINED``
    after a warm-up of a third of it."""
    least = SUSTAINED[device.type]
    call()  # loads and chooses the kernel
    once = _repeated(call, 1, device)
    _repeated(call, _fitting(least / 3, once), device)
    once = _repeated(call, 3, device)
    return _repeated(call, _fitting(least, once), device)


def _fitting(span: float, once: float) -> int:
    return max(1, math.ceil(span / max(once, 1e-7)))


def _repeated(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds of one of them."""
    _wait(device)
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait(device)
    return (time.perf_counter() - started) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
