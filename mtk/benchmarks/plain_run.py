"""The plain loop as a subject of the stopwatch: mtk's initial weights, the same batches and
learning rates, so that the two losses show that both train the same thing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from mtk.benchmarks.measured_run import batches_of, opened
from mtk.benchmarks.plain_loop import PlainModel, PlainTraining, Sizes
from mtk.benchmarks.timing import Clock, Mark, Subject, TrainRun, measure, no_mark, steps_needed
from mtk.config.bench import TrainBenchConfig
from mtk.config.model import ModelConfig
from mtk.config.pretrain import PretrainConfig
from mtk.launch.process import Place
from mtk.models.init import initial_value, made_ahead
from mtk.training.assemble import INITIAL_WORKERS
from mtk.training.batch import GlobalBatch
from mtk.training.compiled import compiles
from mtk.training.join import training_ranks
from mtk.training.schedule import Schedule

ACTIVATIONS = ("gelu", "gelu-tanh", "swiglu")
POSITIONS = ("learned", "rope", "none")
# Tokens and labels.
Pair = tuple[Tensor, Tensor]


def not_written(config: PretrainConfig) -> str:
    """Why there is no plain loop for this training, in words; "" where there is one."""
    model, data = config.model, config.data
    options = {
        f"a model of family {model.family}": model.family != "gpt",
        "a mixture of experts": model.num_experts is not None,
        "a pattern of layers": model.hybrid_layer_pattern is not None,
        "dropout": bool(model.hidden_dropout or model.attention_dropout),
        "windows": model.window_size is not None,
        "norms of queries and keys": model.qk_layernorm,
        f"positions of kind {model.position_embedding_type}": model.position_embedding_type
        not in POSITIONS,
        "scaled, partial or interleaved rotation": model.rope_scaling_type is not None
        or model.rotary_percent != 1.0
        or model.rotary_interleaved,
        "parallel residuals": model.use_parallel_residual,
        "norms around zero": model.apply_layernorm_1p,
        "scaled or normed embeddings": model.scale_embeddings or model.embedding_layernorm,
        f"activation {model.activation}": model.activation not in ACTIVATIONS,
        "fp16": config.precision.precision == "fp16",
        "documents kept apart": data.reset_attention_mask or data.reset_position_ids,
        "tokens without loss": data.eod_mask_loss,
        f"{config.world} ranks": config.world > 1,
    }
    missing = [name for name, found in options.items() if found]
    return f"the plain loop has none of this: {', '.join(missing)}" if missing else ""


def sizes_of(model: ModelConfig) -> Sizes:
    """Rows of the padded vocabulary take part, as nobody would write a loop without padding."""
    rope = model.position_embedding_type == "rope"
    return Sizes(
        layers=model.num_layers,
        hidden=model.hidden_size,
        heads=model.num_attention_heads,
        groups=model.query_groups,
        head=model.head_size,
        ffn=model.ffn_size,
        vocab=model.padded_vocab_size,
        positions=model.positions if model.position_embedding_type == "learned" else 0,
        rope_base=model.rotary_base if rope else 0.0,
        rms=model.normalization == "RMSNorm",
        epsilon=model.norm_epsilon,
        activation=model.activation,
        qkv_bias=model.qkv_bias,
        output_bias=model.attention_output_bias,
        mlp_bias=model.mlp_bias,
        tied=not model.untie_embeddings_and_output_weights,
    )


def names_in_mtk(name: str) -> list[str]:
    """mtk's parameters that lie one below the other in the plain model's ``name``."""
    ends = {
        "tokens.weight": "embedding.tokens.weight",
        "positions.weight": "embedding.positions.weight",
        "norm.weight": "final_norm.weight",
        "norm.bias": "final_norm.bias",
        "output.weight": "output.weight",
    }
    if name in ends:
        return [ends[name]]
    _, layer, *parts, kind = name.split(".")
    of = {
        ("norm1",): ("attention_norm",),
        ("norm2",): ("mlp_norm",),
        ("attention", "qkv"): ("attention.query", "attention.key", "attention.value"),
        ("attention", "out"): ("attention.output",),
    }
    modules = of.get(tuple(parts), (".".join(parts),))
    return [f"layers.{layer}.{module}.{kind}" for module in modules]


@torch.no_grad()
def plain_model(config: ModelConfig, seed: int, device: torch.device) -> PlainModel:
    """With the weights that mtk's model of this seed begins with."""
    sizes = sizes_of(config)
    with torch.device("meta"):
        model = PlainModel(sizes)
    model.to_empty(device=device)
    # Rows of each of mtk's parameters in a fused one.
    rows = {
        "attention.query": sizes.heads * sizes.head,
        "attention.key": sizes.groups * sizes.head,
        "attention.value": sizes.groups * sizes.head,
    }
    parts: list[tuple[Tensor, str]] = []
    for name, parameter in model.named_parameters():
        start = 0
        for source in names_in_mtk(name):
            count = next((n for part, n in rows.items() if part in source), parameter.shape[0])
            parts.append((parameter[start : start + count], source))
            start += count
    tasks = (partial(initial_value, n, tuple(part.shape), config, seed) for part, n in parts)
    made = made_ahead(tasks, min(INITIAL_WORKERS, torch.get_num_threads()))
    for (part, _), value in zip(parts, made, strict=True):
        part.copy_(value)
    model.make_rotary(config.seq_length, device)
    return model


def measure_plain(place: Place, config: TrainBenchConfig) -> list[TrainRun]:
    """As ``measure_mtk``; for ``launch``. The batches lie on the device before it begins."""
    with training_ranks(place, config) as ranks:
        device, begun = ranks.device, time.perf_counter()
        steps = steps_needed(config, device)
        config, data = opened(config, steps)
        model = plain_model(config.model, config.runtime.seed, device)
        options = config.optimizer
        training = PlainTraining(
            model,
            lr=options.lr,
            betas=(options.adam_beta1, options.adam_beta2),
            epsilon=options.adam_eps,
            weight_decay=options.weight_decay,
            clip=options.clip_grad,
            bf16=config.precision.precision == "bf16",
            compiled=compiles(config, device),
        )
        built = time.perf_counter() - begun
        schedule = Schedule.from_config(config, config.batch.full * steps)
        ready = [_on_device(b, device) for b in batches_of(config, data, steps, ranks)]
        Clock(device).wait()
        samples = 0
        told: Mark = no_mark

        def step(batches: Sequence[Pair]) -> Tensor:
            nonlocal samples
            loss = training.step(batches, schedule.lr(samples), told)
            samples += config.batch.full
            return loss

        @contextmanager
        def marked(mark: Mark) -> Iterator[None]:
            nonlocal told
            told = mark
            try:
                yield
            finally:
                told = no_mark

        count = sum(parameter.numel() for parameter in model.parameters())
        return [measure(Subject(step, marked, iter(ready), device, count, built), config)]


def _on_device(batch: GlobalBatch, device: torch.device) -> list[Pair]:
    micros = batch.micro_batches
    return [(micro.tokens_BS.to(device), micro.labels_BS.to(device)) for micro in micros]
