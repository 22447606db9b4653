"""``mtk tokenizer inspect``: how a text is cut into tokens."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mtk.log import Reporter
    from mtk.tokenizers import Tokenizer


def register(app: typer.Typer, parents: Mapping[str, typer.Typer]) -> None:
    del app
    parents["tokenizer"].command("inspect", help="Show the tokens of a text.")(_inspect)


def _inspect(
    text: Annotated[str, typer.Argument(help="The text, or - to read standard input.")],
    tokenizer: Annotated[
        str,
        typer.Option(
            help="Folder of a tokenizer: trained or saved by mtk (P.tokenizer), or with "
            "tokenizer.json."
        ),
    ],
    json_: Annotated[
        bool, typer.Option("--json", help="One JSON line on stdout instead of a table.")
    ] = False,
) -> None:
    from mtk.log import Reporter
    from mtk.tokenizers import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    content = _standard_input() if text == "-" else text
    _show(loaded, content, Reporter(json_lines=json_))


def _standard_input() -> str:
    from mtk.errors import DataError

    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not UTF-8 at byte {error.start}.") from error


def _show(tokenizer: Tokenizer, text: str, reporter: Reporter) -> None:
    ids = tokenizer.encode(text)
    pieces = [(token, tokenizer.piece(token), tokenizer.token_bytes(token)) for token in ids]
    if reporter.json_lines:
        reporter.result(
            "",
            kind=tokenizer.kind,
            fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            text_bytes=len(text.encode()),
            tokens=[
                {"id": token, "piece": piece, "bytes": None if raw is None else raw.hex()}
                for token, piece, raw in pieces
            ],
        )
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("id", "piece", "bytes", "text")
    for token, piece, raw in pieces:
        shown = "" if raw is None else repr(raw.decode(errors="replace"))[1:-1]
        table.add_row(str(token), Text(piece), "-" if raw is None else raw.hex(" "), Text(shown))
    console = Console(highlight=False)
    console.print(table)
    size = len(text.encode())
    ratio = f", {size / len(ids):.2f} bytes a token" if ids else ""
    console.print(
        f"{len(ids)} tokens of {size} bytes{ratio} ({tokenizer.kind}, vocabulary "
        f"{tokenizer.vocab_size}, fingerprint {tokenizer.fingerprint[:16]})",
        markup=False,
        soft_wrap=True,
    )
