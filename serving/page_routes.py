"""The page at ``/``: a prompt, a streaming answer, live figures; all of it from this server."""

from __future__ import annotations

from importlib.resources import files

from flask import Blueprint, Response

from mtk.errors import ServingError

KINDS = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "main.js": "text/javascript; charset=utf-8",
    "stream.js": "text/javascript; charset=utf-8",
    "tokens.js": "text/javascript; charset=utf-8",
    "figures.js": "text/javascript; charset=utf-8",
}
# Nothing from elsewhere, nothing inline, no framing: what a model writes can do no harm.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def blueprint() -> Blueprint:
    routes = Blueprint("page", __name__)
    folder = files("serving") / "page"
    contents = {name: (folder / name).read_bytes() for name in KINDS}

    @routes.get("/")
    def page() -> Response:
        return _answer(contents, "index.html")

    @routes.get("/page/<name>")
    def part(name: str) -> Response:
        """A closed list: no path of a client is ever joined to a folder."""
        if name not in contents:
            raise ServingError(f"the page has no part {name[:80]!r}", status=404)
        return _answer(contents, name)

    return routes


def _answer(contents: dict[str, bytes], name: str) -> Response:
    response = Response(contents[name], content_type=KINDS[name])
    response.headers["Content-Security-Policy"] = POLICY
    response.headers["Cache-Control"] = "no-cache"
    return response
