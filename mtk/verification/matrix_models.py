"""The tiny models of the parity matrix, and the run of each layout.

Sizes are multiples of 2, 3, 4, 6 and 8 where layouts cut them, so that most layouts of up to 8
ranks are legal. Between them the first two models have: GPT-2's parts and Llama's, tied and untied
output, learned and rotary positions, biases or none, and fewer key/value heads than tensor
ranks (one, and four). The others run where they are asked for: the second with DeepSeek-V3's
router and a shared expert; one with Mamba layers, with fewer groups than ranks, among attention
and MLPs; BERT, its norms first; T5 as published.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mtk.config import make
from mtk.config.parallel import ParallelConfig
from mtk.config.pretrain import BatchConfig, PretrainConfig
from mtk.config.verify import VerifyMatrixConfig
from mtk.parallel.legal_layouts import data_parallel_size, legal_layouts, name, pairwise_subset
from mtk.verification.prepare import ADAM_EPS

_BASE: Mapping[str, Any] = {
    "num_layers": 8,
    "hidden_size": 48,
    "num_attention_heads": 24,
    "ffn_hidden_size": 96,
    "seq_length": 48,
    "vocab_size": 91,
    "make_vocab_size_divisible_by": 24,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "init_method_std": 0.1,
    "mock_data": True,
    "micro_batch_size": 1,
    "train_iters": 10,
    "lr": 1e-3,
    "adam_eps": ADAM_EPS,
    "save": "unused",
    "device": "cpu",
}
_MOE: Mapping[str, Any] = {
    **_BASE,
    "num_query_groups": 4,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "activation": "swiglu",
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "untie_embeddings_and_output_weights": True,
    "num_experts": 24,
    "moe_ffn_hidden_size": 64,
    # Some pipeline stages have experts, others have none.
    "moe_layer_freq": 4,
    # Heavy enough to be seen in the gradients.
    "moe_aux_loss_coeff": 0.3,
    "moe_z_loss_coeff": 0.03,
}
MODELS: Mapping[str, Mapping[str, Any]] = {
    "dense": {**_BASE, "num_query_groups": 1},
    "moe": _MOE,
    "moe-biased": {
        **_MOE,
        "moe_layer_freq": "[0]*3+[1]*5",
        "moe_router_topk": 4,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_router_num_groups": 6,
        "moe_router_group_topk": 2,
        "moe_shared_expert_intermediate_size": 48,
        "moe_shared_expert_gate": True,
    },
    "hybrid": {
        **_BASE,
        "hybrid_layer_pattern": "MM-*M-M*",
        "num_query_groups": 4,
        "position_embedding_type": "none",
        "normalization": "RMSNorm",
        "mamba_num_heads": 24,
        "mamba_head_dim": 4,
        "mamba_state_dim": 6,
        "mamba_num_groups": 4,
        "mamba_chunk_size": 7,
        # Memories as long as the sequence; a list, as it comes back from JSON.
        "mamba_a_range": [0.1, 2.0],
    },
    "bert": {**_BASE, "family": "bert"},
    "t5": {
        **_BASE,
        "family": "t5",
        "num_layers": 4,
        "decoder_seq_length": 24,
        "position_embedding_type": "relative",
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20,
        "normalization": "RMSNorm",
        "activation": "geglu-tanh",
        "add_bias_linear": False,
        "softmax_scale": 1.0,
        "scale_tied_output": True,
    },
}
# Of --matrix unless told otherwise.
BOTH = ("dense", "moe")
# Any number of copies of the model can share it.
SHARED_BY_ALL = BatchConfig(micro_batch_size=1, global_batch_size=840)
LEAST_SAMPLES = 4


@dataclasses.dataclass(frozen=True)
class Case:
    """One layout of one model."""

    model: str
    layout: ParallelConfig

    @property
    def world(self) -> int:
        return self.layout.nproc

    @property
    def key(self) -> str:
        """Unique and the same in every run, e.g. ``dense tp2.sp-dp2.full``."""
        return f"{self.model} {name(self.layout)}"

    def run(self, seed: int) -> PretrainConfig:
        """The training whose step is compared."""
        config = _run(self.model, seed)
        batch = dataclasses.replace(config.batch, global_batch_size=self.samples)
        return dataclasses.replace(config, parallel=self.layout, batch=batch)

    @property
    def samples(self) -> int:
        """Of the global batch: at least four, and equally many for each copy of the model."""
        copies = data_parallel_size(self.layout)
        return copies * -(-LEAST_SAMPLES // copies)


def _run(model: str, seed: int) -> PretrainConfig:
    return make(PretrainConfig, **{**MODELS[model], "seed": seed})


def cases(config: VerifyMatrixConfig) -> list[Case]:
    """All that the options ask for; fewest ranks first."""
    options = config.matrix
    found = [case for model in _models(options.model) for case in _cases(model, config)]
    if options.limit is not None and options.limit < len(found):
        found = random.Random(config.runtime.seed).sample(found, options.limit)
    return sorted(found, key=lambda case: (case.world, case.model, case.samples, case.key))


def _models(choice: str) -> Sequence[str]:
    return BOTH if choice == "both" else (choice,)


def _cases(model: str, config: VerifyMatrixConfig) -> Iterator[Case]:
    sizes = _run(model, config.runtime.seed).model
    layouts = [
        layout
        for world in config.matrix.span
        for layout in legal_layouts(world, sizes, SHARED_BY_ALL)
    ]
    if config.matrix.subset == "pairwise":
        layouts = pairwise_subset(layouts)
    # One process beside itself would prove nothing.
    yield from (Case(model, layout) for layout in layouts if layout.nproc > 1)
