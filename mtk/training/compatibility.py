"""What a checkpoint and a run must share beyond shapes, which agree by chance too often."""

from __future__ import annotations

from pathlib import Path

from mtk.checkpoint.load import read_model_config
from mtk.config.model import ModelConfig
from mtk.config.positions import RELATIVE_OPTIONS
from mtk.convert.open_model import has_tokenizer
from mtk.errors import CheckpointError
from mtk.tokenizers import Tokenizer, load_tokenizer

# Options that change the function but no shape of any weight. Not among them is what those who
# train a model on for longer sequences change on purpose: base and scaling of rope, the window.
FUNCTION = (
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "activation",
    "normalization",
    "norm_epsilon",
    "position_embedding_type",
    "rotary_percent",
    "lora",
    "task_head",
    "rotary_interleaved",
    *RELATIVE_OPTIONS,
    "use_parallel_residual",
    "apply_layernorm_1p",
    "scale_embeddings",
    "moe_router_topk",
    "moe_router_score_function",
    "moe_router_pre_softmax",
    "moe_router_topk_scaling_factor",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "hybrid_layer_pattern",
    "mamba_head_dim",
    "mamba_num_groups",
    "mamba_state_dim",
    "mamba_dt_limit",
)


def check_model(folder: Path, model: ModelConfig) -> None:
    """The weights in ``folder`` are those of a model of this kind. Raises CheckpointError."""
    saved = read_model_config(folder)
    differences = [
        f"{name} was {getattr(saved, name)!r}, now {getattr(model, name)!r}"
        for name in FUNCTION
        if getattr(saved, name) != getattr(model, name)
    ]
    if differences:
        raise CheckpointError(
            f"{folder} holds another model: {'; '.join(differences)}. Give the kinds and sizes "
            f"it was trained with."
        )


def check_tokenizer(folder: Path, data_tokenizer: Path | None) -> None:
    """The ids of the data mean the same text as those the weights were trained on.

    folder: of a checkpoint or of a Hugging Face model. Tokenizers of different kinds pass if
    every id stands for the same bytes. Raises CheckpointError.
    """
    own = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    if data_tokenizer is None or not has_tokenizer(own):
        return
    known, given = load_tokenizer(own), load_tokenizer(data_tokenizer)
    if known.fingerprint == given.fingerprint or _same_bytes(known, given):
        return
    raise CheckpointError(
        f"{folder} was trained with another tokenizer ({known.kind}, {known.vocab_size} ids, "
        f"fingerprint {known.fingerprint[:12]}...) than the data ({given.kind}, "
        f"{given.vocab_size} ids, {given.fingerprint[:12]}...), so its ids mean other "
        f"texts. Preprocess the data with --tokenizer-model {own}."
    )


def _same_bytes(first: Tokenizer, second: Tokenizer) -> bool:
    if first.vocab_size != second.vocab_size:
        return False
    pairs = [(first.token_bytes(i), second.token_bytes(i)) for i in range(first.vocab_size)]
    return all(one is not None and one == other for one, other in pairs)
