"""How many blocks the cache gets."""

from __future__ import annotations

import torch

from mtk.config.serve import CacheConfig
from mtk.errors import ConfigError, Problem
from mtk.models.gpt import GPT
from serving.paged.batch import PagedSettings
from serving.paged.fixed import GPU_WINDOW, HOST_WINDOW
from serving.paged.layers import cache_shape
from serving.paged.lookup import DraftSettings
from serving.paged.step_cost import step_cost
from serving.paged.storage import CacheShape

# Computed in one step: what keeps a GPU busy for longer than it takes to launch, and a host for
# about as long.
GPU_TOKENS, HOST_TOKENS = 8192, 2048
# Of a GPU's free memory; the rest is for activations, graphs and other libraries.
FREE_SHARE = 0.85
# Beyond what all sequences can fill, room for beginnings that are kept for later requests.
KEPT_TIMES = 2


def paged_settings(
    model: GPT, options: CacheConfig, *, rows: int, context: int, ahead: bool | None = None
) -> PagedSettings:
    """Settings for ``rows`` sequences of at most ``context`` tokens. A cache too small for one of
    that length lowers the context. ahead: as in :class:`PagedSettings` (default: on a GPU).
    Raises ConfigError for a cache too small for any."""
    shape = cache_shape(model)
    blocks = cache_blocks(shape, options, rows=rows, context=context)
    gpu = shape.device.type == "cuda"
    return PagedSettings(
        rows=rows,
        context=min(context, blocks * shape.block),
        blocks=blocks,
        tokens=options.max_batched_tokens or (GPU_TOKENS if gpu else HOST_TOKENS),
        remember=options.prefix_caching,
        ahead=gpu if ahead is None else ahead,
        drafts=draft_settings(options, shape.device),
        window=_window(model, gpu) if options.deterministic_mode else None,
        graphs=gpu and options.cuda_graphs,
    )


def draft_settings(options: CacheConfig, device: torch.device) -> DraftSettings | None:
    """What is guessed, if anything; not where steps have fixed shapes."""
    if options.speculation == "off" or options.deterministic_mode:
        return None
    return DraftSettings(
        most=options.draft_tokens,
        longest=options.lookup_ngram,
        shortest=options.lookup_min_ngram,
        entries=options.speculation_tokens,
        cost=step_cost(device),
    )


def _window(model: GPT, gpu: bool) -> int:
    if model.config.num_experts is not None:
        rule = "an expert multiplies as many tokens as chose it, in whatever company"
        fix = "Leave --deterministic-mode out for models with experts."
        raise ConfigError([Problem("cache.deterministic_mode", True, rule, fix)])
    return GPU_WINDOW if gpu else HOST_WINDOW


def cache_blocks(shape: CacheShape, options: CacheConfig, *, rows: int, context: int) -> int:
    """Blocks that were asked for, or by default those that all sequences can fill, on a GPU twice
    as many if ``FREE_SHARE`` of what is free holds them."""
    asked: float | None = None
    most = rows * -(-context // shape.block)
    if options.kv_cache_tokens is not None:
        asked, name = options.kv_cache_tokens, "cache.kv_cache_tokens"
        blocks = asked // shape.block
    elif options.kv_cache_gib is not None and shape.block_bytes:
        asked, name = options.kv_cache_gib, "cache.kv_cache_gib"
        blocks = int(options.kv_cache_gib * 2**30) // shape.block_bytes
    elif shape.device.type == "cuda" and shape.block_bytes:
        free, _ = torch.cuda.mem_get_info(shape.device)
        name = "cache.kv_cache_gib"
        blocks = min(KEPT_TIMES * most, int(FREE_SHARE * free) // shape.block_bytes)
    else:
        return most
    if blocks < 1:
        rule = f"the cache must hold at least {shape.block} tokens ({shape.block_bytes} bytes)"
        raise ConfigError([Problem(name, asked, rule, "Give it more, or free memory.")])
    return blocks
