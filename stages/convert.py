"""Stage ``convert``: native, Hugging Face and Megatron checkpoints, with a certificate."""

from __future__ import annotations

from mtk.artifacts import Artifact, input_file, publish_directory
from mtk.config.convert import ConvertConfig
from mtk.errors import ConfigError, ConversionError
from mtk.session import Session
from stages.skip import up_to_date

KINDS = {"native": "checkpoint", "hf": "hf_model", "megatron": "megatron_model"}


def run(config: ConvertConfig, session: Session | None = None) -> Artifact:
    """Write ``config.save``; nothing appears there unless both models give the same logits.

    Raises ConversionError (no counterpart, weights left over) and GateError (parity).
    """
    from mtk.convert.adapters import has_adapters
    from mtk.convert.lazy import DTYPES
    from mtk.convert.megatron.open_checkpoint import read_given
    from mtk.convert.megatron.publish import Target, publish_megatron
    from mtk.convert.open_model import unread_tokenizer
    from mtk.convert.publish_model import Demands, check_reference, write_hf, write_native
    from mtk.convert.source import find_source

    session = session or Session()
    source = find_source(config.load)
    _check_kinds(config, source.kind, adapters=has_adapters(source.folder))
    given = read_given(config.megatron_args, config.true_vocab_size)
    inputs = source.inputs()
    if config.megatron_args is not None:
        inputs.append(input_file(config.megatron_args, "megatron_args"))
    done = up_to_date(config.save, "convert", config, inputs, session)
    if done is not None:
        return done
    check_reference(config.reference)
    demands = Demands(
        DTYPES[config.dtype] if config.dtype else None,
        config.tolerance,
        config.reference,
        config.max_shard_size,
        given,
        config.hf_family,
    )
    left_out = unread_tokenizer(source.folder)
    if left_out:
        session.reporter.warn(
            f"{source.folder} has no tokenizer.json: its tokenizer ({', '.join(left_out)}) is left "
            f"out. Save it there with save_pretrained of a fast tokenizer to take it along."
        )
    session.reporter.info(f"converting {source.folder} ({source.kind}) to {config.to} ...")
    with publish_directory(
        config.save,
        kind=KINDS[config.to],
        stage="convert",
        config=config,
        inputs=inputs,
        command=session.command,
        force=session.force,
    ) as publication:
        if config.to == "hf":
            parity = write_hf(source, publication.folder, demands)
        elif config.to == "megatron":
            parity = publish_megatron(
                source,
                publication.folder,
                demands,
                Target(
                    config.target_tensor_parallel_size,
                    config.target_pipeline_parallel_size,
                    config.target_transformer_impl,
                ),
            )
        else:
            parity = write_native(source, publication.folder, config, demands)
        publication.metrics.update(
            max_abs_logit_error=parity.max_abs_logit_error,
            top1_agreement=parity.top1_agreement,
            reference=parity.reference,
        )
    session.reporter.info(
        f"parity with {parity.reference}: largest logit error "
        f"{parity.max_abs_logit_error:.2e} (allowed {parity.limit:.2e}), same top token at "
        f"{parity.top1_agreement:.2%} of positions"
    )
    return publication.artifact


def _check_kinds(config: ConvertConfig, kind: str, *, adapters: bool) -> None:
    if config.source != "auto" and config.source != kind:
        raise ConversionError(f"{config.load} is {kind}, but --from says {config.source}.")
    if kind == "quantized":
        raise ConversionError(
            f"{config.load} is quantised; convert what it was made from (mtk lineage shows it)."
        )
    misplaced = list(config.misplaced(f"{config.load}, which is {kind}"))
    if kind != "megatron" and misplaced:
        raise ConfigError(misplaced)
    # Adapters become a whole model.
    if kind == config.to != "megatron" and not adapters:
        raise ConversionError(f"{config.load} is {kind} already; there is nothing to convert.")
