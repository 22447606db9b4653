"""Attention back-ends by name, and what each of them cannot do, in one table.

Two callers ask: the configuration before anything starts (a device of "auto" is not known
then), and the training of a rank, which knows the device it is on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mtk.errors import Problem

if TYPE_CHECKING:
    from mtk.config.pretrain import PretrainConfig

AttentionBackend = Literal[
    "auto",
    "sdpa",
    "flash",
    "cudnn",
    "efficient",
    "math",
    "flash-attn",
    "flash3",
    "flash4",
    "transformer-engine",
]
KEY = "runtime.attention_backend"


@dataclass(frozen=True)
class Limits:
    """title: the name in messages. lacks: names of ``RULES`` that it breaks. source: what to
    install for it, "" where PyTorch has it."""

    title: str
    lacks: frozenset[str] = frozenset()
    source: str = ""


def _limits(title: str, lacks: str = "", source: str = "") -> Limits:
    return Limits(title, frozenset(lacks.split()), source)


# PyTorch's flash attention expresses windows as masks, which it has not on CUDA; packages that
# know windows have no masks either.
MASKLESS = "documents biases padding masked_dropout"
BACKENDS: Mapping[AttentionBackend, Limits] = {
    "auto": _limits("the measured choice"),
    "sdpa": _limits("PyTorch's own choice"),
    "math": _limits("the formula written out"),
    "flash": _limits("flash attention", f"cpu_dropout fp32 windows {MASKLESS}"),
    "cudnn": _limits(
        "cuDNN's attention", "cpu fp32 learned_biases ring_documents not_deterministic"
    ),
    "efficient": _limits("memory-efficient attention", "cpu blocks"),
    "flash-attn": _limits("flash-attn", f"cpu fp32 blocks {MASKLESS}", "the package flash-attn"),
    "flash3": _limits(
        "FlashAttention 3",
        f"cpu fp32 dropout windows blocks {MASKLESS}",
        "the module flash_attn_interface (from the folder hopper of flash-attention)",
    ),
    "flash4": _limits(
        "FlashAttention 4",
        f"cpu fp32 dropout windows blocks {MASKLESS}",
        "the package flash-attn-4",
    ),
    "transformer-engine": _limits(
        "Transformer Engine's attention",
        f"cpu fp32 blocks not_deterministic {MASKLESS}",
        "the package transformer-engine[pytorch]",
    ),
}
# Of these it is not known beforehand whether they keep scores.
_UNKNOWN = ("auto", "sdpa", "math")


def surely_fused(backend: AttentionBackend) -> bool:
    """It never keeps scores, whatever the tensors are."""
    return backend not in _UNKNOWN


@dataclass(frozen=True)
class Rule:
    """asks: whether the run needs it. device: where the rule holds ("" everywhere). text: with
    the back-end's ``{title}``; fix: what to do besides using another back-end."""

    asks: Callable[[PretrainConfig], bool]
    device: str
    text: str
    fix: str = ""


def _ring(config: PretrainConfig) -> bool:
    """Attention is computed block by block on the ranks."""
    parallel = config.parallel
    return parallel.context_parallel_size > 1 and parallel.cp_comm_type != "a2a"


RULES: Mapping[str, Rule] = {
    "cpu": Rule(lambda config: True, "cpu", "{title} has kernels for CUDA only", "--device cuda"),
    "cpu_dropout": Rule(
        lambda config: bool(config.model.attention_dropout),
        "cpu",
        "{title} has no dropout on the CPU",
        "--attention-dropout 0",
    ),
    "fp32": Rule(
        lambda config: config.precision.precision == "fp32",
        "cuda",
        "{title} needs bf16 or fp16 on CUDA",
        "--bf16",
    ),
    "dropout": Rule(
        lambda config: bool(config.model.attention_dropout),
        "cuda",
        "{title} has no dropout",
        "--attention-dropout 0",
    ),
    "documents": Rule(
        lambda config: config.data.reset_attention_mask,
        "cuda",
        "{title} has no mask for documents (--reset-attention-mask, packed conversations) on CUDA",
    ),
    "windows": Rule(
        lambda config: config.model.window_size is not None,
        "cuda",
        "{title} on CUDA takes no window here",
    ),
    "biases": Rule(
        lambda config: config.model.biases_scores,
        "cuda",
        "{title} on CUDA takes no bias on scores",
    ),
    "learned_biases": Rule(
        lambda config: config.model.position_embedding_type == "relative",
        "cuda",
        "{title} gives a bias on scores no gradient",
    ),
    "padding": Rule(
        lambda config: config.model.family != "gpt",
        "cuda",
        "{title} on CUDA takes no mask, which padded samples need",
    ),
    "masked_dropout": Rule(
        lambda config: (
            _ring(config)
            and config.parallel.cp_comm_type == "all_gather"
            and bool(config.model.attention_dropout)
        ),
        "cuda",
        "{title} takes no mask, which dropout on gathered keys needs",
        "--attention-dropout 0 or --cp-comm-type a2a",
    ),
    "blocks": Rule(
        _ring,
        "",
        "{title} sees whole sequences; --cp-comm-type p2p and all_gather compute blocks of them "
        "with PyTorch's own operators",
        "--cp-comm-type a2a",
    ),
    "ring_documents": Rule(
        lambda config: _ring(config) and config.data.reset_attention_mask,
        "cuda",
        "{title} knows no documents in blocks of a sequence",
        "--cp-comm-type a2a",
    ),
    "not_deterministic": Rule(
        lambda config: config.runtime.deterministic_mode,
        "",
        "{title} adds up gradients in any order; --deterministic-mode asks for one",
    ),
}


def attention_problems(config: PretrainConfig, device: str) -> Iterator[Problem]:
    """What ``runtime.attention_backend`` lacks for this run, all of it.

    device: "cpu" or "cuda"; "auto" where it is not known yet: then only what holds on both, and
    of back-ends that are for CUDA alone what holds there.
    """
    backend = config.runtime.attention_backend
    limits = BACKENDS[backend]
    if device == "auto" and "cpu" in limits.lacks:
        device = "cuda"
    for name in sorted(limits.lacks, key=list(RULES).index):
        rule = RULES[name]
        if rule.device in ("", device) and rule.asks(config):
            fix = f"Use {rule.fix}, or --attention-backend auto." if rule.fix else ""
            fix = fix or "Use --attention-backend auto."
            yield Problem(KEY, backend, rule.text.format(title=limits.title), fix)
