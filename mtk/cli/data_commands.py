"""``mtk data``: what is in a dataset, and which of it a step of a training saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mtk.data.document_text import ShownDocument
    from mtk.data.statistics import Lengths, Statistics
    from mtk.tokenizers import Tokenizer

LONGEST_LIST = 16  # runs that are printed of a sample's field

_PREFIX = typer.Argument(help="A dataset's prefix, e.g. data/wiki_text_document.")
_JSON = typer.Option("--json", help="Machine-readable JSON lines on stdout, people on stderr.")
_VERIFY = typer.Option(
    "--verify/--no-verify", help="Hash the corpus before its lines are believed."
)


def register(app: typer.Typer, parents: Mapping[str, typer.Typer]) -> None:
    """Add the commands to the group ``data``."""
    del app
    group = parents["data"]
    group.command("show", help="A document, or a sample as a training makes it.")(_show)
    group.command("stats", help="Documents, lengths, token frequencies; a plot.")(_stats)
    group.command("check", help="Whole, as its manifest says, and within its vocabulary?")(_check)


# -- show ---------------------------------------------------------------------------------


def _show(
    prefix: Annotated[str, _PREFIX],
    document: Annotated[int | None, typer.Option(help="Number of a document, from 0.")] = None,
    sample: Annotated[int | None, typer.Option(help="Number of a sample, from 0.")] = None,
    family: Annotated[str, typer.Option(help="Whose samples: gpt, bert, t5 or ict.")] = "gpt",
    seq_length: Annotated[int, typer.Option(help="Tokens of a sample.")] = 1024,
    decoder_seq_length: Annotated[int, typer.Option(help="Tokens of T5's decoder.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the order and of masks.")] = 1234,
    data_order: Annotated[str, typer.Option(help="epochs or megatron.")] = "epochs",
    titles_data_path: Annotated[
        str | None, typer.Option(help="ict: dataset with the titles of the documents.")
    ] = None,
    query_in_block_prob: Annotated[
        float, typer.Option(help="ict: how often a sentence also stays in its block.")
    ] = 0.1,
    use_one_sent_docs: Annotated[
        bool, typer.Option(help="ict: blocks may be single sentences.")
    ] = False,
    verify: Annotated[bool, _VERIFY] = True,
    json_: Annotated[bool, _JSON] = False,
) -> None:
    from mtk.data.dataset_artifact import open_dataset
    from mtk.errors import ConfigError, Problem

    if (document is None) == (sample is None):
        rule = "give exactly one of --document and --sample"
        raise ConfigError([Problem("sample", sample, rule, "Nearest: --sample 0.")])
    info = open_dataset(prefix)
    if document is not None:
        _show_document(info, document, verify, json_)
        return
    from mtk.data.shown_samples import SampleOptions

    for name, value, known in (
        ("family", family, ("gpt", "bert", "t5", "ict")),
        ("data_order", data_order, ("epochs", "megatron")),
    ):
        if value not in known:
            rule = f"must be one of {', '.join(known)}"
            raise ConfigError([Problem(name, value, rule, f"Nearest: {known[0]}.")])
    options = SampleOptions(
        family,  # type: ignore[arg-type]  # checked just above
        seq_length,
        decoder_seq_length,
        seed,
        data_order,  # type: ignore[arg-type]
        titles_data_path,
        query_in_block_prob,
        use_one_sent_docs,
    )
    assert sample is not None
    _show_sample(info, options, sample, verify, json_)


def _show_document(info: Any, document: int, verify: bool, json_: bool) -> None:
    from mtk.data.document_text import show_document
    from mtk.log import Reporter

    shown = show_document(info, document, verify_digest=verify)
    Reporter(json_lines=json_).result(
        "\n".join(_document_lines(str(info.prefix), shown)),
        dataset=str(info.prefix),
        document=shown.document,
        sequences=shown.sequences,
        text=shown.text,
        origin=None if shown.origin is None else shown.origin.to_dict(),
        unknown=shown.unknown,
        agreement=shown.agreement,
    )


def _document_lines(prefix: str, shown: ShownDocument) -> list[str]:
    tokens = sum(map(len, shown.sequences))
    lines = [
        f"{prefix}, document {shown.document}: {tokens:,} tokens in "
        f"{len(shown.sequences):,} sequences"
    ]
    if shown.origin is None:
        lines.append(f"from: not known, as {shown.unknown}")
    else:
        agrees = {
            "same": "; tokenized again it gives the same ids",
            "different": "; TOKENIZED AGAIN IT GIVES OTHER IDS",
            "not compared": "",
        }
        lines.append(f"from: {shown.origin}{agrees[shown.agreement]}")
    if shown.text is None:
        lines.append(f"ids: {' '.join(str(i) for ids in shown.sequences for i in ids)}")
    else:
        lines += ["text:", shown.text]
    return lines


def _show_sample(info: Any, options: Any, sample: int, verify: bool, json_: bool) -> None:
    from mtk.data.shown_samples import samples_of
    from mtk.errors import ConfigError, Problem
    from mtk.log import Reporter
    from mtk.tokenizers import load_tokenizer
    from mtk.training.audit import trace_samples

    if sample < 0:
        rule = "must not be negative"
        raise ConfigError([Problem("sample", sample, rule, "Nearest: 0.")])
    dataset = samples_of(info, options, sample + 1)
    trace = trace_samples(dataset, [sample], verify_corpus=verify)
    content = {name: value.tolist() for name, value in dataset[sample].items()}
    (found,) = trace.samples
    lines = [f"sample {sample} of {len(dataset):,} of {found.dataset}"]
    lines += [f"  {part}" for part in found.parts]
    lines += [f"  origin not known, as {reason}" for reason in trace.unknown.values()]
    tokenizer = None if info.tokenizer_folder is None else load_tokenizer(info.tokenizer_folder)
    for name, value in content.items():
        if tokenizer is not None and name.endswith("tokens"):
            lines += [f"{name}:", spelled(tokenizer, value)]
        elif not (value and isinstance(value, list) and isinstance(value[0], list)):
            lines.append(f"{name}: {runs(value)}")
    fields = found.to_dict()
    Reporter(json_lines=json_).result(
        "\n".join(lines),
        sample=sample,
        dataset=found.dataset,
        documents=fields["documents"],
        unknown=dict(trace.unknown),
        content=content,
    )


def spelled(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Tokens as text with the special ones by their names; by pieces where these are not bytes."""
    parts = [tokenizer.token_bytes(i) for i in ids]
    if not tokenizer.exact_bytes or any(part is None for part in parts):
        return " ".join(tokenizer.piece(i) for i in ids)
    named = (part or tokenizer.piece(i).encode() for i, part in zip(ids, parts, strict=True))
    return b"".join(named).decode(errors="replace")


def runs(value: Any) -> str:
    """A list with equal neighbours counted together, its middle left out where it is long."""
    if not isinstance(value, list):
        return str(value)
    found = [(item, len(list(same))) for item, same in groupby(value)]
    shown = [f"{item} x {count:,}" if count > 1 else f"{item}" for item, count in found]
    if len(shown) <= LONGEST_LIST:
        return ", ".join(shown)
    shown[LONGEST_LIST // 2 : -LONGEST_LIST // 2] = ["..."]
    return f"{', '.join(shown)} ({len(value):,} in all; --json has every one)"


# -- stats --------------------------------------------------------------------------------


def _stats(
    prefix: Annotated[str, _PREFIX],
    plot: Annotated[str | None, typer.Option(help="PNG file: how long documents are.")] = None,
    tokens: Annotated[bool, typer.Option(help="Read all tokens, to count ids.")] = True,
    top: Annotated[int, typer.Option(help="How many of the most frequent ids to list.")] = 10,
    json_: Annotated[bool, _JSON] = False,
) -> None:
    from pathlib import Path

    from mtk.data.dataset_artifact import open_dataset
    from mtk.data.statistics import document_lengths, statistics
    from mtk.errors import ConfigError, Problem
    from mtk.log import Reporter

    if plot is not None and not plot.endswith(".png"):
        raise ConfigError([Problem("plot", plot, "must end in .png", f"Nearest: {plot}.png.")])
    info, reporter = open_dataset(prefix), Reporter(json_lines=json_)
    dataset = info.open()
    with reporter.progress("count", dataset.num_tokens / 1e6, "M tokens") as progress:
        found = statistics(
            dataset,
            vocab_size=info.vocab_size,
            eod=info.eod,
            count_tokens=tokens,
            common=max(0, top),
            progress=progress,
        )
    if plot is not None:
        from mtk.data.length_plot import draw_lengths

        draw_lengths(document_lengths(dataset), info.prefix.name, Path(plot))
    lines = _stats_lines(found, _pieces(info, found))
    reporter.result("\n".join(lines), **found.to_dict(), plot=plot)


def _pieces(info: Any, found: Statistics) -> dict[int, str]:
    """How the most frequent ids are spelled."""
    from mtk.tokenizers import load_tokenizer

    if info.tokenizer_folder is None or found.tokens_of is None:
        return {}
    tokenizer = load_tokenizer(info.tokenizer_folder)
    known = (i for i, _ in found.tokens_of.common if i < tokenizer.vocab_size)
    return {i: tokenizer.piece(i) for i in known}


def _stats_lines(found: Statistics, pieces: Mapping[int, str]) -> list[str]:
    lines = [
        f"{found.prefix}: {found.documents.count:,} documents, {found.sequences.count:,} "
        f"sequences, {found.tokens:,} tokens ({found.dtype}, {found.bytes:,} bytes)",
        f"documents  {_length_line(found.documents)}",
        f"sequences  {_length_line(found.sequences)}",
    ]
    counts = found.tokens_of
    if counts is None:
        return lines
    vocabulary = "" if counts.vocab_size is None else f" of {counts.vocab_size:,}"
    unused = "" if counts.unused is None else f", {counts.unused:,} unused"
    lines.append(
        f"ids        {counts.used:,}{vocabulary} occur{unused}; {counts.outside:,} outside"
    )
    if counts.eod_count is not None:
        lines.append(
            f"EOD        id {counts.eod}: {counts.eod_count:,} times; {counts.unended:,} documents "
            f"with tokens do not end with it"
        )
    for token, count in counts.common:
        share = count / found.tokens
        lines.append(
            f"           {token:>8}  {count:>14,}  {share:6.2%}  {pieces.get(token, '')!r}"
        )
    return lines


def _length_line(lengths: Lengths) -> str:
    shown = ", ".join(f"p{p} {length:,}" for p, length in lengths.percentiles.items())
    empty = f"{lengths.empty:,} empty ({lengths.empty_share:.2%})"
    return f"{empty}; mean {lengths.mean:,.1f} tokens, {shown}" if shown else empty


def _check(prefix: Annotated[str, _PREFIX], json_: Annotated[bool, _JSON] = False) -> None:
    from dataclasses import asdict

    from mtk.data.dataset_check import check_dataset
    from mtk.log import Reporter

    reporter = Reporter(json_lines=json_)
    with reporter.progress("read", None, "M tokens") as progress:
        found = check_dataset(prefix, progress)
    lines = [f"{found.prefix}: {found.documents:,} documents, {found.tokens:,} tokens"]
    reporter.result("\n".join([*lines, *(f"  {text}" for text in found.done)]), **asdict(found))
