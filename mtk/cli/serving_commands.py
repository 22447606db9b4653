"""``mtk client``: talk to a running server."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from serving.client import Client

HELP = (
    "Talk to a running server: interactively, or one --prompt. Exit code 2 when the server "
    "refuses the request, 6 when no server answers or it failed."
)


def register(app: typer.Typer, parents: Mapping[str, typer.Typer]) -> None:
    del parents
    app.command("client", help=HELP)(_client)


def _client(
    address: Annotated[
        str, typer.Argument(metavar="HOST:PORT", help="Where the server listens.")
    ] = "127.0.0.1:5000",
    prompt: Annotated[
        str | None, typer.Option(help="Continue this text and leave; - reads standard input.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from the K likeliest tokens; 0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest of sum P; 1 is off.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Repeat the same draw.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text (may be repeated).")
    ] = None,
    echo: Annotated[bool, typer.Option(help="Print the prompt before the continuation.")] = False,
    api_key_file: Annotated[
        str | None, typer.Option(help="File whose first line is the key of the server.")
    ] = None,
    json_: Annotated[
        bool, typer.Option("--json", help="One JSON line on stdout; needs --prompt.")
    ] = False,
) -> None:
    from mtk.errors import ConfigError, Problem
    from serving.client import Client

    if json_ and prompt is None:
        raise ConfigError([Problem("json", True, "needs --prompt TEXT")])
    options: dict[str, Any] = {
        "max_tokens": tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "stop": stop or None,
    }
    client = Client(address, api_key=_key(api_key_file))
    if prompt is None:
        from serving.conversation import Conversation

        Conversation(client, options).run()
        return
    _one_shot(client, sys.stdin.read() if prompt == "-" else prompt, options, echo, json_)


def _one_shot(
    client: Client, prompt: str, options: Mapping[str, Any], echo: bool, json_lines: bool
) -> None:
    from mtk.log import Reporter

    answer = client.complete(prompt, **options)
    text = prompt + answer.text if echo else answer.text
    Reporter(json_lines=json_lines).result(
        text,
        prompt=prompt,
        text=text,
        finish_reason=answer.finish_reason,
        usage=dict(answer.usage),
        model=answer.model,
    )


def _key(path: str | None) -> str | None:
    from mtk.errors import ConfigError, Problem

    if path is None:
        return None
    try:
        lines = Path(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        problem = Problem("api_key_file", path, f"cannot be read ({error})")
        raise ConfigError([problem]) from error
    if not lines:
        raise ConfigError([Problem("api_key_file", path, "holds no key")])
    return lines[0]
