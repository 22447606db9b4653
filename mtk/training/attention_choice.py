"""Which attention kernel a run uses: the one asked for, or the fastest by measurement.

PyTorch's order of its fused kernels differs between versions and GPUs and is not always the
fastest, so "auto" times forward and backward of each of them on this device, on tensors of the
run's own shape. One of them is the favourite of the GPU; another has to be clearly faster, so
that noise does not change the kernel from start to start.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtk.config.attention_rules import attention_problems
from mtk.config.pretrain import PretrainConfig
from mtk.errors import LayoutError
from mtk.models.attention import EVERYWHERE, AttentionKernel, Form, form_of, sdpa_kernel
from mtk.models.attention_backends import named_kernel, ordered, restore_flash
from mtk.parallel.collectives import share_object
from mtk.parallel.ranks import Ranks
from mtk.precision.main_weights import COMPUTE_DTYPES

# How much longer the favourite may take than the fastest.
MARGIN = 1.05
ROUNDS = 5
# FLOPs of one forward and backward: some milliseconds, and enough work for a whole GPU.
LIMIT = 1e12
# Sequences are not cut below this: kernels are about equally efficient from here on.
LONG = 4096

# Seconds that the device takes for one call.
Timer = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Chosen:
    """backend: its name. seconds: of forward and backward of what was measured, by name."""

    kernel: AttentionKernel
    backend: str
    seconds: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """``cudnn (measured, ms: cudnn 1.9, flash 3.4)``"""
        if not self.seconds:
            return self.backend
        each = ", ".join(
            f"{name} {seconds * 1e3:.3g}" for name, seconds in sorted(self.seconds.items())
        )
        return f"{self.backend} (measured, ms: {each})"


@dataclass(frozen=True)
class Work:
    """What one call of attention gets on a rank.

    documents: a mask comes with it (packed documents, padding). bias: scores are biased;
    learned: the bias has a gradient.
    """

    batch: int
    heads: int
    groups: int
    length: int
    head_size: int
    dtype: torch.dtype
    form: Form
    dropout: float = 0.0
    documents: bool = False
    bias: bool = False
    learned: bool = False

    @property
    def flops(self) -> float:
        """Of forward and backward (2.5 times forward)."""
        whole = 3.5 * 4 * self.batch * self.heads * self.length**2 * self.head_size
        return whole / 2 if self.form.causal else whole

    def within(self, limit: float) -> Work:
        """Less of the same: of the batch, then of groups of heads, then of a long sequence."""
        work = self
        for name in ("batch", "groups"):
            have = getattr(work, name)
            fewer = max(1, min(have, int(have * limit / work.flops)))
            heads = work.heads * fewer // have if name == "groups" else work.heads
            work = dataclasses.replace(work, **{name: fewer, "heads": heads})
        while work.flops > limit and work.length % 2 == 0 and work.length >= 2 * LONG:
            work = dataclasses.replace(work, length=work.length // 2)
        return work


def attention_kernel(config: PretrainConfig, ranks: Ranks) -> Chosen:
    """The kernel of the run, the same on every rank; all of them must call it.

    "auto" is PyTorch's own choice on the CPU, and in deterministic mode, where nothing may
    depend on a measurement: there torch leaves out cuDNN, whose backward is not deterministic.
    So it is for blocks of a sequence (``mtk.parallel.context_fused`` picks theirs). Raises
    LayoutError where the back-end cannot do what the run needs, or is not installed.
    """
    device, backend = ranks.device, config.runtime.attention_backend
    if problems := list(attention_problems(config, device.type)):
        raise LayoutError(problems)
    measures = backend == "auto" and device.type == "cuda" and config.model.has_attention
    blocks = ranks.cp.size > 1 and config.parallel.cp_comm_type != "a2a"
    if not measures or blocks or config.runtime.deterministic_mode:
        name = "sdpa" if backend == "auto" else backend
        return Chosen(named_kernel(backend, device), name)
    restore_flash()
    favourites = order_of_preference(torch.cuda.get_device_capability(device))
    own: dict[str, float] = {}
    if ranks.world.first:
        own = measured(work_of(config), device, favourites, device_seconds)
    seconds: dict[str, float] = share_object(own, ranks.world, "run.attention")
    return choose(seconds, favourites)


def order_of_preference(capability: tuple[int, int]) -> tuple[str, ...]:
    """cuDNN has kernels of its own for Hopper and later; flash attention is as good before."""
    if capability >= (9, 0):
        return ("cudnn", "flash", "efficient")
    return ("flash", "cudnn", "efficient")


def choose(seconds: Mapping[str, float], favourites: Sequence[str]) -> Chosen:
    """The first of ``favourites`` in ``seconds``, unless another is faster by the margin.

    What else took the run's tensors follows it, for calls of other shapes, and the formula
    written out in the end. Nothing measured: PyTorch's own choice.
    """
    able = [name for name in favourites if name in seconds]
    if not able:
        return Chosen(sdpa_kernel, "sdpa")
    fastest = min(able, key=seconds.__getitem__)
    best = fastest if seconds[able[0]] > MARGIN * seconds[fastest] else able[0]
    rest = [name for name in able if name != best]
    return Chosen(ordered(best, *rest, "math"), best, dict(seconds))


def work_of(config: PretrainConfig) -> Work:
    """The self-attention of a rank: of T5 that of the encoder."""
    model, parallel = config.model, config.parallel
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    # All-to-all: a rank has whole sequences and a share of the heads, of groups at least one.
    groups = max(1, model.query_groups // tp)
    decoder = model.family == "gpt"
    return Work(
        batch=config.batch.micro_batch_size,
        heads=max(1, model.num_attention_heads // tp // cp),
        groups=math.lcm(groups, cp) // cp,
        length=model.seq_length,
        head_size=model.head_size,
        dtype=COMPUTE_DTYPES[config.precision.precision],
        form=form_of(model) if decoder else EVERYWHERE,
        dropout=model.attention_dropout,
        documents=not model.biases_scores
        and (config.data.reset_attention_mask if decoder else True),
        bias=model.biases_scores,
        learned=model.position_embedding_type == "relative",
    )


def measured(
    work: Work, device: torch.device, backends: Sequence[str], timer: Timer
) -> dict[str, float]:
    """Seconds of forward and backward by name, the median of some; those that refuse the
    tensors, or that the user has switched off in torch, are missing.

    Takes nothing from the run's random numbers and keeps none of its memory.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        seconds = _medians(random_inputs(work.within(LIMIT), device), backends, timer)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return seconds


def _medians(inputs: Mapping[str, Any], backends: Sequence[str], timer: Timer) -> dict[str, float]:
    runs: dict[str, Callable[[], object]] = {}
    for name in backends:
        run = partial(forward_and_backward, ordered(name), inputs)
        if switched_on(name) and _accepted(run):
            runs[name] = run
    times: dict[str, list[float]] = {name: [] for name in runs}
    # In turn, so that a clock that rises meanwhile favours none of them.
    for _ in range(ROUNDS):
        for name, found in times.items():
            found.append(timer(runs[name]))
    return {name: statistics.median(found) for name, found in times.items()}


def switched_on(backend: str) -> bool:
    """In ``torch.backends.cuda``."""
    switches: Mapping[str, Callable[[], bool]] = {
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled,
        "flash": torch.backends.cuda.flash_sdp_enabled,
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
        "math": torch.backends.cuda.math_sdp_enabled,
    }
    return switches[backend]()


def _accepted(run: Callable[[], object]) -> bool:
    """Whether it runs at all; twice, as the first time builds plans and loads kernels."""
    with warnings.catch_warnings():
        # torch warns of every reason why an implementation refuses.
        warnings.simplefilter("ignore")
        try:
            for _ in range(2):
                run()
        except RuntimeError:  # also of too little memory
            return False
    return True


def random_inputs(work: Work, device: torch.device) -> dict[str, Any]:
    """Arguments of an attention kernel, and ``grad`` of its output."""
    generator = torch.Generator(device).manual_seed(0)
    rows, size = (work.length, work.head_size), {"device": device, "dtype": work.dtype}

    def random(heads: int) -> Tensor:
        return torch.randn(work.batch, heads, *rows, generator=generator, **size)  # type: ignore[call-overload, no-any-return]

    bias = None
    if work.bias:
        bias = torch.zeros(1, work.heads, work.length, work.length, **size)  # type: ignore[call-overload]
        bias.requires_grad_(work.learned)
    documents = None
    if work.documents:
        documents = torch.zeros(work.batch, work.length, dtype=torch.int64, device=device)
    return {
        "q": random(work.heads).requires_grad_(),
        "k": random(work.groups).requires_grad_(),
        "v": random(work.groups).requires_grad_(),
        "grad": random(work.heads),
        "bias": bias,
        "documents": documents,
        "form": work.form,
        "dropout": work.dropout,
    }


def forward_and_backward(kernel: AttentionKernel, inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Gradients of the queries, keys and values, and of a learned bias."""
    settings = {name: inputs[name] for name in ("bias", "documents", "form", "dropout")}
    q, k, v, bias = (inputs[name] for name in ("q", "k", "v", "bias"))
    out = kernel(q, k, v, mask=None, **settings)
    learned = (bias,) if bias is not None and bias.requires_grad else ()
    return torch.autograd.grad(out, (q, k, v, *learned), inputs["grad"])


def device_seconds(run: Callable[[], object]) -> float:
    """Of the GPU alone: it is kept waiting until the host has queued all of the call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda._sleep(2_000_000)  # type: ignore[no-untyped-call]
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
