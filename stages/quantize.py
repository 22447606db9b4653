"""Stage ``quantize``: fewer bits for the weights, with a quality gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mtk.artifacts import Artifact, publish_directory
from mtk.config.quantize import QuantizeConfig
from mtk.session import Session
from stages.skip import up_to_date


def run(config: QuantizeConfig, session: Session | None = None) -> Artifact:
    """Write ``config.save``; nothing appears there if perplexity rises by more than allowed.

    With both dialects each has a folder of its own inside. Raises ConversionError,
    DataError and GateError.
    """
    from mtk.convert.source import find_source
    from mtk.quantization.gate import gate_inputs

    session = session or Session()
    source = find_source(config.load)
    inputs = [*source.inputs(), *gate_inputs(config)]
    done = up_to_date(config.save, "quantize", config, inputs, session)
    if done is not None:
        return done
    with publish_directory(
        config.save,
        kind="quantized_model",
        stage="quantize",
        config=config,
        inputs=inputs,
        command=session.command,
        force=session.force,
    ) as publication:
        publication.metrics.update(_quantize(config, publication.folder, session))
    return publication.artifact


def _quantize(config: QuantizeConfig, staging: Path, session: Session) -> dict[str, Any]:
    from mtk.convert.hf_directory import write_json
    from mtk.convert.lazy import DTYPES
    from mtk.convert.open_model import open_model
    from mtk.convert.source import find_source
    from mtk.quantization import gate
    from mtk.quantization.dialects import NAMES, dialect_of
    from mtk.quantization.formats import KINDS, format_of
    from mtk.quantization.quantize_model import (
        certify,
        check_rounding,
        open_written,
        read_original,
        write_quantized,
    )

    dtype = DTYPES[config.dtype] if config.dtype else None
    original = read_original(find_source(config.load), dtype)
    before = open_model(config.load)
    tokenizer = before.tokenizer if before.has_tokenizer else None
    sequences = gate.gate_sequences(config, tokenizer, before.model)
    total = sum(len(tokens) - 1 for tokens in sequences)
    with session.reporter.progress("perplexity before", total, "tokens") as bar:
        loss_before, tokens = gate.measure(before.model, sequences, bar.advance)
    del before
    names = NAMES if config.dialect == "both" else (config.dialect,)
    kind, metrics = KINDS[config.format], dict[str, Any]()
    rounding = format_of(kind, config.group_size)
    for name in names:
        folder = staging / name if len(names) > 1 else staging
        session.reporter.info(f"writing {config.format} for {name} ...")
        dialect = dialect_of(name, kind, config.group_size)
        write_quantized(original, folder, dialect, rounding, config.max_shard_size)
        weight_error = check_rounding(original, folder, rounding)
        opened = open_written(folder)
        parity = certify(opened, rounding)
        with session.reporter.progress("perplexity after", total, "tokens") as bar:
            loss_after, _ = gate.measure(opened.model, sequences, bar.advance)
        verdict = gate.judge(name, loss_before, loss_after, tokens, config.max_perplexity_increase)
        gate.require(verdict)
        session.reporter.info(
            f"perplexity {verdict.perplexity_before:.5g} -> {verdict.perplexity_after:.5g} "
            f"({verdict.increase:+.3f} %, allowed {verdict.limit:+.3f} %)"
        )
        record = {"format": "mtk-gate", "version": 1, **verdict.to_dict()}
        record |= {"largest_relative_weight_error": weight_error, "parity": parity.to_dict()}
        write_json(folder / "gate.json", record)
        metrics.update(
            perplexity_before=verdict.perplexity_before,
            perplexity_after=verdict.perplexity_after,
            perplexity_increase_percent=verdict.increase,
            gate_tokens=tokens,
        )
    return metrics
