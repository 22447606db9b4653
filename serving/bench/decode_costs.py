"""What reading prompts and decoding must compute and move at least, and what the device can."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from mtk.config.model import ModelConfig
from mtk.models.count_families import flops_per_token
from mtk.models.gpt import GPT
from serving.decode_bytes import cache_token_bytes, prompts_only, state_bytes
from serving.encoder_prompt import has_encoder

# Bytes a second of the memory as its maker states it (SXM modules).
PEAK_BANDWIDTH = {
    "h200": 4.8e12,
    "h100": 3.35e12,
    "b200": 8.0e12,
    "a100": 2.039e12,
    "a100-40gb": 1.555e12,
    "l40s": 0.864e12,
    "v100": 0.9e12,
}
COPIED = {"cuda": 2**30, "cpu": 2**26}


def prefill_flops(config: ModelConfig, batch: int, prompt_tokens: int) -> float:
    """Of one forward pass over all prompts: a third of a training step's, attention causal, and
    the output matrix for the last token of each prompt only (of a T5 the encoder's over them, and
    the decoder's over one token)."""
    if has_encoder(config):
        one = replace(config, seq_length=prompt_tokens, decoder_seq_length=1)
        return batch * prompt_tokens * flops_per_token(one).causal / 3
    each = flops_per_token(replace(config, seq_length=prompt_tokens)).causal / 3
    output = 2.0 * config.padded_vocab_size * config.hidden_size
    return batch * (prompt_tokens * (each - output) + output)


def weight_bytes(model: GPT, batch: int) -> int:
    """What a decode step reads of the weights: all matrices, but only rows of the embeddings,
    of experts as many as ``batch`` tokens can choose, and nothing that only prompts go through."""
    tables = set()
    if model.embedding is not None:
        tables = {id(p) for p in model.embedding.parameters() if p.ndim == 2}
    tables.discard(id(model.output_weight))
    experts, top = model.config.num_experts or 1, model.config.moe_router_topk
    share = min(1.0, batch * top / experts)
    total = 0.0
    for name, weight in model.named_parameters():
        if id(weight) not in tables and not prompts_only(model, name):
            size = weight.numel() * weight.element_size()
            total += size * (share if ".experts." in f".{name}" else 1.0)
    return round(total)


def cache_bytes(model: GPT, batch: int, seen: float) -> int:
    """What a decode step reads of keys and values, ``seen`` tokens in each row (of a T5 those of
    the prompt and of the decoder together), and of states."""
    return round(batch * (seen * cache_token_bytes(model) + state_bytes(model)))


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of copying a large tensor: the best of seven."""
    source = torch.empty(COPIED[device.type], dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(7):
        _wait(device)
        started = time.perf_counter()
        target.copy_(source)
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return 2 * source.numel() / min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
