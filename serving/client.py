"""A client for the server, with the standard library only.

Every failure is an error of mtk: WorkerError (exit 6) when no server answers or the server
itself failed, ServingError (exit 2) when the server refused the request.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from mtk.errors import ConfigError, Problem, ServingError, WorkerError

DEFAULT_PORT = 5000


@dataclass
class Answer:
    """A finished completion. usage: token counts by OpenAI's names."""

    text: str = ""
    finish_reason: str | None = None
    usage: Mapping[str, int] = field(default_factory=dict)
    model: str = ""


class Client:
    """One server. address: HOST:PORT, PORT, or a URL. timeout: seconds without a byte."""

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

    def model(self) -> str:
        """The name of the served model."""
        with self._exchange("GET", "/v1/models") as response:
            listed = self._json(response.read())
        try:
            return str(listed["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise self._no_mtk() from None

    def stream(self, prompt: str, answer: Answer, **options: Any) -> Generator[str, None, None]:
        """Pieces of the continuation as they come; ``answer`` is filled on the way.

        options: further fields of ``POST /v1/completions``. Closing the iterator tells the
        server to stop.
        """
        body = {
            "prompt": prompt,
            "stream": True,
            "stream_options": {"include_usage": True},
            **options,
        }
        with self._exchange("POST", "/v1/completions", body) as response:
            for chunk in self._events(response):
                if "error" in chunk:
                    raise _failed(int(chunk["error"].get("code") or 500), chunk["error"])
                answer.model = str(chunk.get("model", answer.model))
                answer.usage = chunk.get("usage") or answer.usage
                for choice in chunk.get("choices", ()):
                    answer.finish_reason = choice["finish_reason"] or answer.finish_reason
                    answer.text += choice["text"]
                    yield choice["text"]

    def complete(self, prompt: str, **options: Any) -> Answer:
        """The whole continuation at once."""
        answer = Answer()
        for _ in self.stream(prompt, answer, **options):
            pass
        return answer

    def _events(self, response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
        for line in response:
            if line.startswith(b"data: [DONE]"):
                return
            if line.startswith(b"data: "):
                yield self._json(line[6:])
        raise WorkerError(f"{self.url} ended the answer in the middle; see the server's log.")

    @contextmanager
    def _exchange(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=self._timeout)
        data = None if body is None else json.dumps(body).encode()
        try:
            connection.request(method, path, data, self._headers)
            response = connection.getresponse()
            try:
                if response.status != 200:
                    raise _failed(response.status, self._json(response.read()).get("error"))
                yield response
            finally:
                response.close()
        except (OSError, http.client.HTTPException) as error:
            raise WorkerError(
                f"no answer from {self.url}: {_reason(error)}. Is the server running? "
                f"Start one with mtk serve --load MODEL --port {self.port}."
            ) from error
        finally:
            connection.close()

    def _json(self, data: bytes) -> dict[str, Any]:
        try:
            parsed = json.loads(data)
        except ValueError:
            raise self._no_mtk() from None
        if not isinstance(parsed, dict):
            raise self._no_mtk()
        return parsed

    def _no_mtk(self) -> WorkerError:
        return WorkerError(f"what answers at {self.url} is no server of mtk.")


def _failed(status: int, error: Any) -> ServingError | WorkerError:
    fields = error if isinstance(error, dict) else {}
    message = f"the server answered {status}: {fields.get('message', 'no reason given')}"
    if status >= 500:
        return WorkerError(message)
    return ServingError(message, status=status, param=fields.get("param"))


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"{type(error).__name__} {error}".strip()


def parse_address(address: str) -> tuple[str, int, bool]:
    """(host, port, whether TLS). Raises ConfigError for what is no address."""
    text = f"127.0.0.1:{address}" if address.isdigit() else address
    parts = urlsplit(text if "://" in text else f"http://{text}")
    try:
        port = parts.port or DEFAULT_PORT
        good = parts.scheme in ("http", "https") and parts.path in ("", "/")
        if good and not (parts.query or parts.fragment or parts.username):
            return parts.hostname or "127.0.0.1", port, parts.scheme == "https"
    except ValueError:
        pass
    rule = "is no address of a server"
    raise ConfigError([Problem("address", address, rule, "Write HOST:PORT, e.g. localhost:5000.")])
