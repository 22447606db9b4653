"""Routes beside generation: health, models, lineage, tokenizer, metrics."""

from __future__ import annotations

import time
from typing import Any

from flask import Blueprint, Response, jsonify, request

from mtk.errors import MtkError, ServingError
from serving.body import Fields, encode, read_json, wrong_type
from serving.openai_fields import check_model
from serving.service import Service


def blueprint(service: Service) -> Blueprint:
    """All of them need an API key, if there are keys, except ``/livez``."""
    routes = Blueprint("info", __name__)
    started = int(time.time())

    @routes.get("/livez")
    def livez() -> Response:
        """200 as long as HTTP is answered; restarting helps only where this fails."""
        return jsonify({"status": "live"})

    @routes.get("/readyz")
    def readyz() -> Response:
        """200 when a token was decoded just now and a new request would be taken."""
        state = _health(service)
        if state["ready"] and service.in_flight >= service.settings.max_concurrency:
            state.update(ready=False, reason="max_concurrency is reached")
        return _with_status(state)

    @routes.get("/health")
    def health() -> Response:
        """200 when a token was decoded just now, however long the queue is."""
        return _with_status(_health(service))

    @routes.get("/v1/models")
    def models() -> Response:
        return jsonify({"object": "list", "data": [_model(service, started)]})

    @routes.get("/v1/models/<path:name>")
    def model(name: str) -> Response:
        check_model(Fields({"model": name}), service.settings)
        return jsonify(_model(service, started))

    @routes.get("/v1/lineage")
    def lineage() -> Response:
        """The chain of digests from the served model to the corpus."""
        if service.settings.lineage is None:
            raise ServingError("the served model is not an mtk artifact", status=404)
        return jsonify(service.settings.lineage)

    @routes.post("/tokenize")
    def tokenize() -> Response:
        fields = _fields(service, "prompt")
        if fields.text("prompt") is None:
            raise ServingError("prompt is required: a text", param="prompt")
        encoder, tokenizer = service.engine.encoder, service.engine.tokenizer
        ids = encode(fields.raw("prompt"), tokenizer, "prompt", framed=encoder is not None)
        longest = service.engine.context if encoder is None else encoder.context
        return jsonify({"tokens": ids, "count": len(ids), "max_model_len": longest})

    @routes.post("/detokenize")
    def detokenize() -> Response:
        fields = _fields(service, "tokens")
        return jsonify({"prompt": _decode(service, fields.raw("tokens"))})

    @routes.get("/metrics")
    def metrics() -> Response:
        return Response(service.metrics.exposition(), content_type=service.metrics.content_type)

    return routes


def _fields(service: Service, name: str) -> Fields:
    fields = Fields(read_json(request))
    fields.refuse_unknown((name, "model"))
    check_model(fields, service.settings)
    return fields


def _decode(service: Service, tokens: object) -> str:
    limit = service.engine.vocab_size
    if not isinstance(tokens, list):
        raise wrong_type("tokens", tokens, "a list of token ids")
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int):
            raise wrong_type("tokens", token, "a list of token ids")
        if not 0 <= token < limit:
            raise ServingError(f"token id {token} is not in 0..{limit - 1}", param="tokens")
    try:
        return service.engine.tokenizer.decode(tokens)
    except MtkError as error:
        raise ServingError(str(error), param="tokens") from None


def _model(service: Service, started: int) -> dict[str, Any]:
    encoder = service.engine.encoder
    return {
        "id": service.settings.model,
        "object": "model",
        "created": started,
        "owned_by": "mtk",
        "max_model_len": service.engine.context,
        "max_encoder_len": None if encoder is None else encoder.context,
        "chat": service.settings.chat is not None,
    }


def _health(service: Service) -> dict[str, Any]:
    found = service.health()
    ready, reason = found.ready, found.reason
    if service.draining:
        ready, reason = False, "the server is stopping"
    stats = service.engine.stats()
    return {
        "status": "ok" if ready else "unavailable",
        "ready": ready,
        "reason": reason,
        "running": stats.running,
        "waiting": stats.waiting,
        "in_flight": service.in_flight,
    }


def _with_status(state: dict[str, Any]) -> Response:
    response = jsonify(state)
    response.status_code = 200 if state["ready"] else 503
    return response
