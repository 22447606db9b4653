"""Checkpoints and directories of small random models for conversion tests."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from mtk.checkpoint.save import CheckpointContent
from mtk.config import make
from mtk.config.convert import ConvertConfig
from mtk.config.model import ModelConfig
from mtk.config.tokenizer import TrainTokenizerConfig
from mtk.log import Reporter
from mtk.models.buffers import kept_buffers, kept_tensors
from mtk.models.gpt import GPT
from mtk.session import Session
from mtk.tokenizers import Tokenizer
from mtk.tokenizers.training import train_tokenizer
from tests.checkpoint.publish import save_checkpoint
from tests.models.sizes import llama_config, small_config, small_model

TEXT = "the quick brown fox jumps over the lazy dog. it's a test; numbers 1,000 and 3.5 too! "
VOCAB = 300


def quiet() -> Session:
    return Session(Reporter(quiet=True))


def gpt2_config(**changes: Any) -> ModelConfig:
    return small_config(**({"activation": "gelu-tanh", "vocab_size": VOCAB} | changes))


def llama(**changes: Any) -> ModelConfig:
    return llama_config(**({"vocab_size": VOCAB} | changes))


def gemma(**changes: Any) -> ModelConfig:
    values = {
        "activation": "geglu-tanh",
        "apply_layernorm_1p": True,
        "scale_embeddings": True,
        "kv_channels": 8,
    }
    return llama(**(values | changes))


def neox(**changes: Any) -> ModelConfig:
    values = {
        "position_embedding_type": "rope",
        "rotary_percent": 0.5,
        "use_parallel_residual": True,
        "activation": "gelu",
        "untie_embeddings_and_output_weights": True,
    }
    return gpt2_config(**(values | changes))


def bloom(**changes: Any) -> ModelConfig:
    values = {"position_embedding_type": "alibi", "embedding_layernorm": True}
    return gpt2_config(**(values | changes))


def loud_model(config: ModelConfig, seed: int = 1) -> GPT:
    """Every weight matters: none is zero or one, and logits spread over several units."""
    model = small_model(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.empty(parameter.shape).normal_(generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.3 * noise)
            elif name.startswith(("embedding", "output")):
                parameter.copy_(noise)
            else:
                parameter.copy_(1.5 * noise / parameter.shape[1] ** 0.5)
        for buffer in kept_buffers(model).values():
            buffer.add_(0.2 * torch.empty(buffer.shape).normal_(generator=generator))
    return model


@lru_cache
def small_tokenizer() -> Tokenizer:
    """A byte-level BPE of exactly VOCAB ids."""
    words = [TEXT, " ".join(f"word{i} item{i * 7}" for i in range(200))]
    config = make(TrainTokenizerConfig, input="-", output="-", vocab_size=VOCAB, min_frequency=1)
    return train_tokenizer(config, lambda: words)


def save_native(
    folder: Path, config: ModelConfig, *, seed: int = 1, tokenizer: bool = True
) -> Path:
    """A checkpoint artifact of a loud model at ``folder``."""
    held = folder.with_name(f"{folder.name}-tokenizer")
    if tokenizer:
        small_tokenizer().save(held)
    content = CheckpointContent(
        config,
        kept_tensors(loud_model(config, seed)),
        tokenizer_folder=held if tokenizer else None,
    )
    save_checkpoint(folder, content, stage="pretrain", config=config, inputs=[], metrics={})
    return folder


def convert_config(load: Path, save: Path, **changes: Any) -> ConvertConfig:
    values = {"load": str(load), "save": str(save), "to": "hf", "reference": "plain"}
    return make(ConvertConfig, **(values | changes))
