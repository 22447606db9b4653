"""``mtk client``: talk to a running server."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from serving.client import Client
    from serving.client_stream import Answer, Stream

HELP = (
    "Talk to a running server: interactively, or one --prompt. Exit code 2 when the server "
    "refuses the request, 6 when no server answers or it failed. The key of a server is read from "
    "--api-key-file, else from the variable MTK_API_KEY."
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
    chat: Annotated[
        bool, typer.Option("--chat", help="A conversation with a memory instead of continuation.")
    ] = False,
    system: Annotated[
        str, typer.Option(help="System prompt of a conversation (implies --chat).")
    ] = "",
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
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the next bytes.")] = 600.0,
    history: Annotated[
        str, typer.Option(help='File of earlier prompts; "" keeps none.')
    ] = "~/.mtk_history",
    json_: Annotated[
        bool, typer.Option("--json", help="One JSON line on stdout; needs --prompt.")
    ] = False,
) -> None:
    from mtk.errors import ConfigError, Problem
    from serving.client import Client, read_key

    problems = [Problem("json", True, "needs --prompt TEXT")] if json_ and prompt is None else []
    if not timeout > 0:
        problems.append(Problem("timeout", timeout, "must be greater than 0"))
    if problems:
        raise ConfigError(problems)
    options: dict[str, Any] = {
        "max_tokens": tokens,
        "temperature": temperature,
        # Left out where it is off: servers other than mtk's say so in other ways.
        "top_k": top_k or None,
        "top_p": top_p,
        "seed": seed,
        "stop": stop or None,
    }
    client = Client(address, api_key=read_key(api_key_file), timeout=timeout)
    chat = chat or bool(system)
    if prompt is None:
        from serving.conversation import Conversation

        Conversation(client, options, chat=chat, system=system, history_file=history or None).run()
        return
    text = sys.stdin.read() if prompt == "-" else prompt
    with _asked(client, text, options, chat, system) as stream:
        _one_shot(stream, text, echo, json_)


def _asked(
    client: Client, prompt: str, options: Mapping[str, Any], chat: bool, system: str
) -> Stream:
    from serving.conversation import Talk

    if chat:
        return client.stream_chat(Talk(system=system).with_system(prompt), **options)
    return client.stream(prompt, **options)


def _one_shot(stream: Stream, prompt: str, echo: bool, json_lines: bool) -> None:
    """Print pieces as they come, or one JSON line at the end."""
    from serving.conversation import printable

    if not json_lines:
        print(prompt if echo else "", end="", flush=True)
        for piece in stream:
            print(printable(piece) if sys.stdout.isatty() else piece, end="", flush=True)
        print(flush=True)
        return
    from mtk.log import Reporter

    answer: Answer = stream.rest()
    Reporter(json_lines=True).result(
        "",
        prompt=prompt,
        text=prompt + answer.text if echo else answer.text,
        finish_reason=answer.finish_reason,
        usage=dict(answer.usage),
        model=answer.model,
    )
