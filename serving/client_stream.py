"""An answer that arrives piece by piece, read from server-sent events.

Every failure is an error of mtk: NoAnswerError (exit 6) when no server answers or the server
itself failed, ServingError (exit 2) when the server refused the request.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from mtk.errors import ServingError, WorkerError


class NoAnswerError(WorkerError):
    """No server answered, or it failed. reason: why in few words, for counting."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass
class Answer:
    """A completion. usage: token counts by OpenAI's names; empty until the end."""

    text: str = ""
    finish_reason: str | None = None
    usage: Mapping[str, int] = field(default_factory=dict)
    model: str = ""


class Exchange:
    """One request on a connection of its own, and the response to it.

    Raises ServingError and NoAnswerError; the connection is closed then.
    """

    def __init__(
        self, connection: http.client.HTTPConnection, url: str, method: str, path: str
    ) -> None:
        self.url = url
        self._connection, self._method, self._path = connection, method, path
        self._response: http.client.HTTPResponse | None = None

    def send(self, body: Mapping[str, Any] | None, headers: Mapping[str, str]) -> None:
        data = None if body is None else json.dumps(body).encode()
        try:
            self._connection.request(self._method, self._path, data, dict(headers))
            self._response = self._connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise self.broken(error) from error
        if self._response.status != 200:
            status, fields = self._response.status, _error_of(self.read())
            raise failed(status, fields)

    def read(self) -> bytes:
        """The whole body."""
        return b"".join(self.lines())

    def lines(self) -> Iterator[bytes]:
        """Lines of the body; the connection is closed behind the last one."""
        assert self._response is not None
        try:
            yield from self._response
        except (OSError, http.client.HTTPException) as error:
            raise self.broken(error) from error
        finally:
            self.close()

    def broken(self, error: Exception) -> NoAnswerError:
        self.close()
        return NoAnswerError(
            f"no answer from {self.url}: {_reason(error)}. Is the server running? Start one with "
            f"mtk serve --load MODEL --port {self._connection.port}.",
            _reason(error),
        )

    def cut_off(self) -> NoAnswerError:
        return NoAnswerError(
            f"{self.url} ended the answer in the middle; see the server's log.", "cut off"
        )

    def close(self) -> None:
        """A server that is still generating notices, and stops."""
        if self._response is not None:
            self._response.close()
        self._connection.close()


class Stream(Iterator[str]):
    """Pieces of text as they come; ``answer`` fills on the way. Use it in a ``with`` block, or
    close it, to tell the server to stop before the end.

    """

    def __init__(self, exchange: Exchange) -> None:
        self.answer = Answer()
        self._exchange = exchange
        self._pieces = self._read()

    def __next__(self) -> str:
        return next(self._pieces)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._pieces.close()
        self._exchange.close()

    def rest(self) -> Answer:
        """Read to the end."""
        for _ in self:
            pass
        return self.answer

    def _read(self) -> Generator[str, None, None]:
        for data in self._events():
            chunk = parsed(data, self._exchange.url)
            if "error" in chunk:
                fields = chunk["error"] if isinstance(chunk["error"], dict) else {}
                raise failed(int(fields.get("code") or 500), fields)
            self.answer.model = str(chunk.get("model", self.answer.model))
            self.answer.usage = chunk.get("usage") or self.answer.usage
            for choice in chunk.get("choices") or ():
                self.answer.finish_reason = choice.get("finish_reason") or self.answer.finish_reason
                piece = _text(choice)
                self.answer.text += piece
                yield piece

    def _events(self) -> Iterator[bytes]:
        """Data of the events up to ``[DONE]``; comments keep a connection open, no more."""
        for line in self._exchange.lines():
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                self._exchange.close()
                return
            yield data
        raise self._exchange.cut_off()


def _text(choice: Mapping[str, Any]) -> str:
    """Of a completion's choice, or of a chat's."""
    if "delta" in choice:
        return (choice["delta"] or {}).get("content") or ""
    return choice.get("text") or ""


def parsed(data: bytes, url: str) -> dict[str, Any]:
    """A JSON object. Raises NoAnswerError for anything else."""
    try:
        found = json.loads(data)
    except ValueError:
        raise no_server(url) from None
    if not isinstance(found, dict):
        raise no_server(url)
    return found


def no_server(url: str) -> NoAnswerError:
    return NoAnswerError(f"what answers at {url} is no server of mtk.", "not JSON")


def failed(status: int, fields: Mapping[str, Any]) -> ServingError | NoAnswerError:
    """The error for an answer that is not 200."""
    message = f"the server answered {status}: {fields.get('message', 'no reason given')}"
    if status >= 500:
        return NoAnswerError(message, f"HTTP {status}")
    return ServingError(message, status=status, param=fields.get("param"))


def _error_of(data: bytes) -> Mapping[str, Any]:
    try:
        fields = json.loads(data)["error"]
    except (ValueError, KeyError, TypeError):
        return {}
    return fields if isinstance(fields, dict) else {"message": str(fields)}


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"{type(error).__name__} {error}".strip()
