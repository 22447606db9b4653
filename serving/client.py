"""A client for the server, with the standard library only.

>>> client = Client("127.0.0.1:5000")
>>> client.complete("Once upon", max_tokens=8, temperature=0).text
>>> with client.stream("Once upon", max_tokens=200) as stream:
...     for piece in stream:
...         print(piece, end="")

Every failure is an error of mtk: NoAnswerError (exit 6) when no server answers or the server
itself failed, ServingError (exit 2) when the server refused the request.
"""

from __future__ import annotations

import http.client
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack
from urllib.parse import quote, urlsplit

from mtk.errors import ConfigError, Problem
from serving.client_stream import Answer, Exchange, Stream, no_server, parsed

DEFAULT_PORT = 5000
KEY_VARIABLE = "MTK_API_KEY"


class Options(TypedDict, total=False):
    """What may be said about an answer; None is as good as not said. extra: further fields of
    the request, as they are."""

    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    model: str | None
    extra: Mapping[str, Any] | None


class Message(TypedDict):
    """role: ``system``, ``user`` or ``assistant``."""

    role: str
    content: str


@dataclass(frozen=True)
class Model:
    """context: most tokens of prompt and answer together, None where the server does not say."""

    name: str
    context: int | None


class Client:
    """One server. address: HOST:PORT, PORT, or a URL. timeout: seconds without a byte.

    It holds no connection, so that any number of threads may use it.
    """

    def __init__(self, address: str, *, api_key: str | None = None, timeout: float = 600.0) -> None:
        self.host, self.port, self._secure = parse_address(address)
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout = timeout

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self._secure else 'http'}://{host}:{self.port}"

    def models(self) -> list[Model]:
        """What is served, at least one."""
        try:
            listed = self.request("GET", "/v1/models")["data"]
            found = [Model(str(entry["id"]), entry.get("max_model_len")) for entry in listed]
        except (KeyError, TypeError, AttributeError):
            raise no_server(self.url) from None
        if not found:
            raise no_server(self.url)
        return found

    def model(self) -> str:
        """The name of the (first) served model."""
        return self.models()[0].name

    def stream(self, prompt: str | Sequence[int], **options: Unpack[Options]) -> Stream:
        """Continue a text, or token ids, piece by piece."""
        given = prompt if isinstance(prompt, str) else list(prompt)
        return self._stream("/v1/completions", {"prompt": given, **_fields(options)})

    def complete(self, prompt: str | Sequence[int], **options: Unpack[Options]) -> Answer:
        """The whole continuation at once."""
        return self.stream(prompt, **options).rest()

    def stream_chat(self, messages: Sequence[Message], **options: Unpack[Options]) -> Stream:
        """The next message of a conversation, piece by piece."""
        body = {"messages": list(messages), **_fields(options)}
        return self._stream("/v1/chat/completions", body)

    def chat(self, messages: Sequence[Message], **options: Unpack[Options]) -> Answer:
        """The next message of a conversation at once."""
        return self.stream_chat(messages, **options).rest()

    def tokenize(self, text: str) -> list[int]:
        found = self.request("POST", "/tokenize", {"prompt": text})
        try:
            return [int(token) for token in found["tokens"]]
        except (KeyError, TypeError, ValueError):
            raise no_server(self.url) from None

    def detokenize(self, tokens: Sequence[int]) -> str:
        return str(self.request("POST", "/detokenize", {"tokens": list(tokens)}).get("prompt", ""))

    def health(self) -> dict[str, Any]:
        """What the server says about itself. Raises NoAnswerError (503) if it is not well."""
        return self.request("GET", "/health")

    def request(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Any route that answers with a JSON object."""
        return parsed(self._exchange(method, path, body).read(), self.url)

    def _stream(self, path: str, body: Mapping[str, Any]) -> Stream:
        if (body.get("n") or 1) != 1:
            raise ConfigError([Problem("n", body["n"], "a stream has one answer", "Nearest: 1.")])
        asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
        return Stream(self._exchange("POST", path, asked))

    def _exchange(self, method: str, path: str, body: Mapping[str, Any] | None) -> Exchange:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=self._timeout)
        exchange = Exchange(connection, self.url, method, quote(path, safe="/"))
        exchange.send(body, self._headers)
        return exchange


def _fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """As the request has them; what was not said is left to the server."""
    said = {name: value for name, value in options.items() if value is not None and name != "extra"}
    return {**said, **(options.get("extra") or {})}


def parse_address(address: str) -> tuple[str, int, bool]:
    """(host, port, whether TLS). Raises ConfigError for what is no address."""
    text = f"127.0.0.1:{address}" if address.isdigit() else address
    parts = urlsplit(text if "://" in text else f"http://{text}")
    try:
        default = DEFAULT_PORT if parts.scheme == "http" else http.client.HTTPS_PORT
        port = parts.port or default
        good = parts.scheme in ("http", "https") and parts.path in ("", "/")
        if good and not (parts.query or parts.fragment or parts.username):
            return parts.hostname or "127.0.0.1", port, parts.scheme == "https"
    except ValueError:
        pass
    rule = "is no address of a server"
    raise ConfigError([Problem("address", address, rule, "Write HOST:PORT, e.g. localhost:5000.")])


def read_key(path: str | None) -> str | None:
    """The key in a file's first line, else in the variable ``MTK_API_KEY``, else none.

    Raises ConfigError for a file that cannot be read or holds none.
    """
    if path is None:
        return os.environ.get(KEY_VARIABLE, "").strip() or None
    try:
        lines = Path(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        problem = Problem("api_key_file", path, f"cannot be read ({error})")
        raise ConfigError([problem]) from error
    if not lines:
        raise ConfigError([Problem("api_key_file", path, "holds no key")])
    return lines[0]
