"""A server of scripted answers, for what a real one does rarely or not yet."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Script:
    """answers: by path, what is sent: (status, JSON) or a list of bytes, sent one after the
    other. seen: (path, body, headers) of every request."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.seen: list[tuple[str, Any, dict[str, str]]] = []
        self.url = ""

    def stream(self, path: str, *chunks: Any, done: bool = True) -> None:
        """Events of these objects, then ``[DONE]``."""
        lines = [f"data: {json.dumps(chunk)}\n\n".encode() for chunk in chunks]
        self.answers[path] = [*lines, *([b"data: [DONE]\n\n"] if done else [])]


@contextmanager
def scripted() -> Iterator[Script]:
    """The server on a free port, while the block runs."""
    script = Script()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            script.seen.append((self.path, body, dict(self.headers)))
            answer = script.answers[self.path]
            if isinstance(answer, tuple):
                status, content = answer
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.end_headers()
                self.wfile.write(data)
                return
            self.send_response(200)
            self.end_headers()
            for part in answer:
                self.wfile.write(part)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    script.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield script
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
