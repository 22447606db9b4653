"""Answers in one dialect or another, whole or as server-sent events.

A stream is one event a step, then ``data: [DONE]``; an error in the middle is an event with
``error``, and no ``[DONE]`` follows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from flask import Response, jsonify

from mtk.errors import ServingError
from serving.errors import describe, error_body
from serving.requests import Delta, GenerationRequest, SequenceOutput
from serving.service import LOOK_EVERY, ClientGoneError, DeltaStream, Service

# Proxies close silent connections; a comment line every so many seconds keeps them open.
PING_EVERY = 10.0


class Objects(Protocol):
    """How a dialect writes down what the engine made."""

    def whole(self, outputs: Sequence[SequenceOutput]) -> dict[str, Any]:
        """The answer that is not streamed."""

    def chunks(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """Events of one step; none for a step that shows nothing."""

    def last_chunks(self) -> Iterator[dict[str, Any]]:
        """Events behind the last step."""


class Asked(Protocol):
    @property
    def generation(self) -> GenerationRequest: ...


def answer_or_stream(service: Service, asked: Asked, objects: Objects) -> Response:
    """Generate; refusals raise ServingError before anything is sent."""
    if not asked.generation.stream:
        return jsonify(objects.whole(service.answer(asked.generation)))
    deltas = service.stream(asked.generation)
    response = Response(_events(service, objects, deltas), mimetype="text/event-stream")
    response.headers["Cache-Control"] = "no-cache"
    response.headers["X-Accel-Buffering"] = "no"
    # Closing a generator that never began runs none of its code, hence this hook.
    response.call_on_close(deltas.close)
    return response


def _events(service: Service, objects: Objects, deltas: DeltaStream) -> Iterator[bytes]:
    silent = 0.0
    try:
        for delta in deltas:
            if delta is None:
                silent += LOOK_EVERY
                if silent >= PING_EVERY:
                    silent = 0.0
                    yield b": ping\n\n"
                continue
            silent = 0.0
            for chunk in objects.chunks(delta):
                yield event(chunk)
        for chunk in objects.last_chunks():
            yield event(chunk)
        yield b"data: [DONE]\n\n"
    except ClientGoneError:
        return
    except ServingError as error:
        yield event(error_body(error))
    except Exception as error:
        service.settings.log(describe(error))
        yield event(error_body(ServingError("internal error", status=500)))


def event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()
