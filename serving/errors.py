"""Errors as HTTP answers: one JSON shape for every route, no traceback ever.

``{"error": {"message", "type", "param", "code"}}``, the form of OpenAI's API, which its
clients turn into exceptions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flask import Flask, Response, jsonify
from werkzeug.exceptions import HTTPException

from mtk.errors import MtkError, ServingError

TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "request_timeout",
    405: "method_not_allowed",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_error",
}


class OverloadedError(ServingError):
    """The server is full or stopping (429 or 503); try again after ``retry_after`` seconds."""

    def __init__(self, message: str, *, status: int = 429, retry_after: int = 1) -> None:
        super().__init__(message, status=status)
        self.retry_after = max(1, retry_after)


class NotReadyError(OverloadedError):
    """The engine died or does not answer (503)."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=503, retry_after=10)


class KeyNeededError(ServingError):
    """No valid API key was sent (401). asks_browser: a browser is to ask for it."""

    def __init__(self, *, asks_browser: bool) -> None:
        super().__init__(
            "a valid key is needed: send the header Authorization: Bearer KEY (in a browser, the "
            "key is the password)",
            status=401,
        )
        self.challenge = 'Basic realm="mtk", charset="UTF-8"' if asks_browser else "Bearer"


def error_type(status: int) -> str:
    default = "invalid_request_error" if status < 500 else "server_error"
    return TYPES.get(status, default)


def error_body(error: ServingError) -> dict[str, Any]:
    """The JSON object for an error; also what a stream sends when it fails midway."""
    fields = {
        "message": str(error),
        "type": error_type(error.status),
        "param": error.param,
        "code": error.status if error.code is None else error.code,
    }
    return {"error": fields}


def respond(error: ServingError) -> Response:
    response = jsonify(error_body(error))
    response.status_code = error.status
    if isinstance(error, OverloadedError):
        response.headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, KeyNeededError):
        response.headers["WWW-Authenticate"] = error.challenge
    return response


def register(app: Flask, report: Callable[[str], None]) -> None:
    """Answer every error of ``app`` in JSON; ``report`` gets the details of surprises."""

    @app.errorhandler(ServingError)
    def serving_error(error: ServingError) -> Response:
        return respond(error)

    @app.errorhandler(MtkError)
    def refused(error: MtkError) -> Response:
        return respond(ServingError(str(error)))

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> Response:
        status = error.code or 500
        message = error.description or error.name
        response = respond(ServingError(message, status=status))
        for name, value in error.get_headers():
            if name == "Allow":
                response.headers[name] = value
        return response

    @app.errorhandler(Exception)
    def surprise(error: Exception) -> Response:
        report(describe(error))
        return respond(ServingError("internal error; the server's log has it", status=500))


def describe(error: BaseException) -> str:
    """An error with its traceback, for the log only."""
    import traceback

    return "".join(traceback.format_exception(error)).rstrip()
