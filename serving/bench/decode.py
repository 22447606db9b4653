"""``mtk bench decode``: reading prompts and decoding, beside transformers and what the device
could do.

mtk and transformers take turns on the same prompts; both run once before they are measured. What
they generate greedily is compared, so that a fast answer is also a right one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mtk.benchmarks.record import write_json
from mtk.config.bench_decode import DecodeBenchConfig
from mtk.config.serve import CacheConfig
from mtk.convert.open_model import OpenedModel, open_model
from mtk.convert.source import find_source
from mtk.errors import ConfigError, MtkError, Problem
from mtk.log import Reporter
from mtk.models.gpt import GPT
from mtk.quantization.linear import quantize_in_place
from serving.bench.decode_costs import copy_rate, weight_bytes
from serving.bench.decode_rows import Report, Timed, content, row_of
from serving.bench.transformers_speed import Generate, missing
from serving.decode_speed import measure_decode, prompts_of
from serving.encoder_prompt import decoder_start, has_encoder
from serving.paged.layers import can_page

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# From a model's path to a folder that transformers reads, for as long as the block runs.
Export = Callable[[str], AbstractContextManager[Path]]


def bench_decode(
    config: DecodeBenchConfig,
    reporter: Reporter,
    export: Export,
    hardware: Sequence[dict[str, Any]] = (),
) -> Report:
    """Measure all batches and lengths; the JSON file is complete after each of them.

    Raises ConfigError for lengths that the model has no positions for, and what opening it
    raises.
    """
    device = _device(config)
    dtype = DTYPES[config.dtype]
    opened = open_model(config.load, dtype=dtype, device=device, packed=True)
    opened.require_generator("load", config.load)
    if config.weights != "stored":
        quantize_in_place(opened.model, config.weights)
    _check_lengths(config, opened)
    report = Report(
        config, opened, hardware, device, copy_rate(device), weight_bytes(opened.model, 1), "", []
    )
    report.skipped = _why_not(config)
    if report.skipped:
        reporter.info(f"transformers is not measured: {report.skipped}")
        _sweep(report, None, reporter)
        return report
    try:
        with export(config.load) as folder:
            compiled = {"auto": None, "on": True, "off": False}[config.compile_transformers]
            beside = Generate(
                folder,
                dtype=dtype,
                device=device.type,
                compiled=compiled,
                encoder=has_encoder(opened.config),
            )
    except MtkError as error:
        report.skipped = str(error)
        reporter.info(f"transformers is not measured: {report.skipped}")
        _sweep(report, None, reporter)
        return report
    _sweep(report, beside, reporter)
    return report


def _device(config: DecodeBenchConfig) -> torch.device:
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    if config.device == "cuda" and not torch.cuda.is_available():
        rule = "no CUDA device is visible to torch"
        raise ConfigError([Problem("device", "cuda", rule, "Give --device cpu.")])
    found = "cuda" if config.device == "auto" and torch.cuda.is_available() else config.device
    return torch.device("cpu" if found == "auto" else found)


def _check_lengths(config: DecodeBenchConfig, opened: OpenedModel) -> None:
    model, prompt = opened.config, max(config.prompt_tokens)
    # Behind an encoder each side has the positions to itself.
    both = (prompt, config.new_tokens)
    longest = max(both) if has_encoder(model) else sum(both)
    if model.positions_are_limited and longest > model.positions:
        rule = f"with --new-tokens {config.new_tokens} needs {longest} positions, of which the "
        rule += f"model has {model.positions}"
        fix = f"Nearest: {max(1, model.positions - config.new_tokens)}."
        raise ConfigError([Problem("prompt_tokens", max(config.prompt_tokens), rule, fix)])


def _why_not(config: DecodeBenchConfig) -> str:
    """Why transformers cannot be measured; "" if it can."""
    if not config.transformers:
        return "--no-transformers"
    if config.weights != "stored":
        return "its weights would not be those of --weights"
    if find_source(config.load).kind == "quantized":
        return "its dialects of quantized weights are others"
    return missing()


def _sweep(report: Report, beside: Generate | None, reporter: Reporter) -> None:
    config, model = report.config, report.model.model
    start = None
    if has_encoder(model.config) and report.model.has_tokenizer:
        start = decoder_start(model.config, report.model.tokenizer)
    for prompt_tokens in config.prompt_tokens:
        for batch in config.batch:
            own, guessed, theirs = _take_turns(config, model, beside, batch, prompt_tokens, start)
            found = []
            if beside is not None:
                found = [row_of(report, "transformers", batch, prompt_tokens, theirs, beside.how)]
            mine = row_of(report, "mtk", batch, prompt_tokens, own, beside=next(iter(found), None))
            if guessed:
                row = row_of(report, "mtk, lookup", batch, prompt_tokens, guessed, beside=mine)
                found.insert(0, row)
            for row in (mine, *found):
                report.rows.append(row)
                reporter.info(f"{row.name}, {batch} x {prompt_tokens}: {row.decode_rate:,.1f}/s")
            write_json(config.output, content(report))


def _take_turns(
    config: DecodeBenchConfig,
    model: GPT,
    beside: Generate | None,
    batch: int,
    prompt_tokens: int,
    start: int | None,
) -> tuple[list[Timed], list[Timed], list[Timed]]:
    """Runs without guesses, with guesses, and of transformers."""
    shape, vocab = (batch, prompt_tokens, config.new_tokens), model.config.vocab_size or 0
    prompts = prompts_of(vocab, batch, prompt_tokens, config.seed, config.prompt_period)
    settings = [CacheConfig(prefix_caching=False, speculation="off")]
    if config.speculation != "off" and can_page(model):
        settings.append(replace(settings[0], speculation=config.speculation))
    own, theirs = [list[Timed](), list[Timed]()], list[Timed]()
    for turn in range(config.repeats + 1):  # the first is for caches, compilers and clocks
        for runs, options in zip(own, settings, strict=False):
            run = measure_decode(
                model,
                *shape,
                options=options,
                seed=config.seed,
                period=config.prompt_period,
                start=start,
            )
            runs += [run] if turn else []
        if beside is not None:
            other = beside.measure(prompts, config.new_tokens)
            theirs += [other] if turn else []
    return own[0], own[1], theirs
