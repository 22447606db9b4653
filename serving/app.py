"""The Flask application around an engine."""

from __future__ import annotations

import base64
import hmac
import time
from contextlib import suppress

from flask import Flask, Response, g, request

from serving import (
    chat_api,
    errors,
    info_routes,
    megatron_api,
    openai_api,
    openapi,
    page_routes,
)
from serving.engine import Engine
from serving.errors import KeyNeededError
from serving.metrics import Metrics
from serving.service import Service
from serving.settings import ServerSettings

METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS")


def create_app(engine: Engine, settings: ServerSettings) -> Flask:
    """All routes over ``engine``; ``service_of(app)`` gives what the server needs to drain."""
    app = Flask("mtk", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body_bytes
    app.json.sort_keys = False  # type: ignore[attr-defined]
    service = Service(engine, settings, Metrics(engine))
    app.extensions["mtk"] = service
    errors.register(app, settings.log)
    _account(app, service)  # before the guard, so that refused keys are accounted for
    _guard(app, settings)
    for routes in (megatron_api, openai_api, chat_api, info_routes, openapi):
        app.register_blueprint(routes.blueprint(service))
    app.register_blueprint(page_routes.blueprint())
    app.after_request(_harden)
    return app


def service_of(app: Flask) -> Service:
    service: Service = app.extensions["mtk"]
    return service


def _harden(response: Response) -> Response:
    """Browsers neither guess types, nor tell other sites where they come from, nor let other
    sites read or embed an answer."""
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "no-referrer"
    response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
    return response


def _guard(app: Flask, settings: ServerSettings) -> None:
    """A key on every route but ``/livez``: as a bearer token, or as the password that browsers
    ask for (then they send it with the page's own requests, too)."""
    keys = [key.encode() for key in settings.api_keys]

    @app.before_request
    def check_key() -> None:
        if not keys or request.path == "/livez":
            return
        sent = _sent_key(request.headers.get("Authorization", ""))
        # Every key is compared, so that the time taken tells nothing.
        matches = [hmac.compare_digest(sent, key) for key in keys]
        if not any(matches):
            raise KeyNeededError(asks_browser=request.path == "/")


def _sent_key(header: str) -> bytes:
    """b"", which is no key, for what is neither of the two schemes."""
    scheme, _, given = header.partition(" ")
    if scheme.lower() == "bearer":
        return given.strip().encode("utf-8", errors="replace")
    if scheme.lower() == "basic":
        with suppress(ValueError):
            return base64.b64decode(given.strip(), validate=True).partition(b":")[2]
    return b""


def _account(app: Flask, service: Service) -> None:
    """Figures and one log line a request, when its answer has gone out."""

    @app.before_request
    def begin() -> None:
        g.started, g.quiet = time.monotonic(), False

    @app.after_request
    def account(response: Response) -> Response:
        started, quiet = g.get("started", time.monotonic()), g.get("quiet", False)
        method = request.method if request.method in METHODS else "other"
        route = request.url_rule.rule if request.url_rule else "unmatched"
        address, status = request.remote_addr, response.status_code

        def end() -> None:
            seconds = time.monotonic() - started
            service.metrics.request(route, method, status, seconds)
            if not quiet and method in ("PUT", "POST"):
                line = f"{address} {method} {route} {status} {seconds * 1000:.0f} ms"
                service.settings.log(line)

        response.call_on_close(end)
        return response
