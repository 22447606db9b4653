"""What each attention back-end lacks is refused before anything starts, all of it at once."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from mtk.config import make
from mtk.config.attention_rules import (
    BACKENDS,
    RULES,
    AttentionBackend,
    attention_problems,
    surely_fused,
)
from mtk.config.pretrain import PretrainConfig
from mtk.errors import ConfigError

RUN: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 16,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "mock_data": True,
    "vocab_size": 64,
    "train_iters": 1,
    "save": "unused",
    "lr": 1e-3,
    "precision": "bf16",
}
# What a run needs, as options; the rule that it meets.
NEEDS: dict[str, dict[str, Any]] = {
    "documents": {"reset_attention_mask": True},
    "windows": {"window_size": 4},
    "biases": {"position_embedding_type": "alibi"},
    "learned_biases": {"position_embedding_type": "relative"},
    "padding": {"family": "bert"},
    "dropout": {"attention_dropout": 0.1},
    "fp32": {"precision": "fp32"},
    "not_deterministic": {"deterministic_mode": True},
    "blocks": {"context_parallel_size": 2, "nproc": 2},
    "ring_documents": {"context_parallel_size": 2, "nproc": 2, "reset_attention_mask": True},
    "masked_dropout": {
        "context_parallel_size": 2,
        "nproc": 2,
        "attention_dropout": 0.1,
        "cp_comm_type": "all_gather",
    },
}


def config(**changes: Any) -> PretrainConfig:
    """With a back-end that lacks nothing; tests put another in its place."""
    return make(PretrainConfig, **{**RUN, **changes})


def refused(backend: AttentionBackend, device: str, **changes: Any) -> list[str]:
    options = config(**changes)
    vars(options.runtime)["attention_backend"] = backend
    return [problem.rule for problem in attention_problems(options, device)]


def test_every_back_end_has_its_line_and_every_rule_a_back_end() -> None:
    assert set(get_args(AttentionBackend)) == set(BACKENDS)
    assert {name for limits in BACKENDS.values() for name in limits.lacks} == set(RULES)
    assert [name for name in BACKENDS if not surely_fused(name)] == ["auto", "sdpa", "math"]


@pytest.mark.parametrize("need", NEEDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_table_is_what_is_refused(backend: AttentionBackend, need: str) -> None:
    own = RULES[need].text.format(title=BACKENDS[backend].title)
    assert (own in refused(backend, "cuda", **NEEDS[need])) == (need in BACKENDS[backend].lacks)


@pytest.mark.parametrize("backend", BACKENDS)
def test_plain_causal_training_in_bf16_is_what_all_can(backend: AttentionBackend) -> None:
    assert refused(backend, "cuda") == []
    assert bool(refused(backend, "cpu")) == ("cpu" in BACKENDS[backend].lacks)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention_backend": "cudnn", "device": "cpu"}, ["kernels for CUDA only"]),
        (
            {"attention_backend": "flash3", "precision": "fp32", "attention_dropout": 0.1},
            ["2 problems", "FlashAttention 3 needs bf16", "has no dropout", "--bf16"],
        ),
        (
            {"attention_backend": "transformer-engine", "deterministic_mode": True},
            ["in any order", "--attention-backend auto"],
        ),
        (
            {"attention_backend": "flash-attn", "context_parallel_size": 2, "nproc": 2},
            ["flash-attn sees whole sequences", "--cp-comm-type a2a"],
        ),
        ({"attention_backend": "fash"}, ["attention_backend", "flash"]),
    ],
)
def test_the_configuration_says_so(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    for word in words:
        assert word in str(caught.value)


def test_an_unknown_device_is_no_reason() -> None:
    config(attention_backend="flash", precision="fp32")
    config(attention_backend="flash-attn", window_size=4)
    config(attention_backend="cudnn", context_parallel_size=2, nproc=2)
    config(attention_backend="flash-attn", context_parallel_size=2, nproc=2, cp_comm_type="a2a")
