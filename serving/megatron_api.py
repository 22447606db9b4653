"""``PUT /api`` (and POST): the fields, ranges and answers of Megatron-LM's server.

Different on purpose: every bad request is a 4xx with a JSON error (the original answers
many with 200 and a string), numbers may be whole where fractions are allowed, a bool is
no number, and ``stop_token`` is the tokenizer's end of document unless given.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from flask import Blueprint, Response, jsonify, request

from mtk.errors import ServingError
from serving.body import Fields, checked_text, encode, read_json, wrong_type
from serving.encoder_prompt import end_tokens, refuse_for_encoder
from serving.engine import Engine
from serving.openai_fields import check_prompt_tokens
from serving.requests import (
    MAX_PENALTY,
    BeamParams,
    GenerationRequest,
    SequenceOutput,
    StopRules,
    check_fits,
)
from serving.sampling import MAX_SEED, MAX_TEMPERATURE, MAX_TOP_K, SamplingParams
from serving.service import Service
from serving.settings import ServerSettings
from serving.text import pieces

OLD_NAMES = {"max_len": "tokens_to_generate", "sentences": "prompts"}
FIELDS = (
    "prompts",
    "tokens_to_generate",
    "logprobs",
    "temperature",
    "top_k",
    "top_p",
    "top_p_decay",
    "top_p_bound",
    "add_BOS",
    "stop_on_double_eol",
    "stop_on_eol",
    "prevent_newline_after_colon",
    "random_seed",
    "no_log",
    "beam_width",
    "stop_token",
    "length_penalty",
)


def blueprint(service: Service) -> Blueprint:
    routes = Blueprint("megatron", __name__)

    @routes.route("/api", methods=["PUT", "POST"])
    def api() -> Response:
        data = read_json(request)
        service.note(quiet=data.get("no_log") is True)
        asked = parse(data, service.engine, service.settings)
        outputs = service.answer(asked)
        return jsonify(answer(asked, outputs, service.engine))

    return routes


def parse(data: dict[str, Any], engine: Engine, settings: ServerSettings) -> GenerationRequest:
    """The request that ``data`` describes, its fields checked in Megatron's order.

    Raises ServingError (400) for the first violation.
    """
    fields = Fields(data)
    prompts = _prompts(fields, settings)
    for old, new in OLD_NAMES.items():
        if old in data:
            raise ServingError(f"{old} is no longer used; give {new} instead", param=old)
    new_tokens = fields.integer(
        "tokens_to_generate", 64, low=0, high=settings.most_new_tokens, limit="max_new_tokens"
    )
    logprobs = fields.flag("logprobs")
    if new_tokens == 0:
        what = "0, scores of the prompts alone"
        refuse_for_encoder(engine.encoder, "tokens_to_generate", what)
    if new_tokens == 0 and not logprobs:
        raise ServingError(
            "tokens_to_generate = 0 only scores the prompts and needs logprobs = true",
            param="logprobs",
        )
    sampling = _sampling(fields, logprobs)
    add_bos = fields.flag("add_BOS")
    if add_bos:
        refuse_for_encoder(engine.encoder, "add_BOS", "a token in front of its continuation")
    if not add_bos and "" in prompts and engine.encoder is None:
        raise ServingError("an empty prompt needs add_BOS = true", param="add_BOS")
    line = _line_stop(fields)
    keep_newline = not fields.flag("prevent_newline_after_colon")
    seed = fields.optional_integer("random_seed", low=0, high=MAX_SEED)
    fields.flag("no_log")
    beam = _beam(fields, engine, settings, len(prompts), new_tokens)
    fields.refuse_unknown(FIELDS)
    start = (engine.tokenizer.eod,) if add_bos else ()
    ids = tuple(_ids(engine, text, start, number) for number, text in enumerate(prompts))
    check_prompt_tokens(ids, settings, "prompts")
    # As in Megatron, the rules about lines replace the end of document.
    ends = end_tokens(engine.tokenizer, engine.encoder)
    stop = StopRules(line=line) if line else StopRules(token_ids=ends)
    asked = GenerationRequest(
        prompts=ids,
        max_tokens=new_tokens,
        sampling=_seeded(sampling, seed),
        stop=stop,
        prompt_logprobs=logprobs and engine.encoder is None,
        newline_after_colon=keep_newline,
        beam=beam,
    )
    limits = {"context": engine.context, "vocab": engine.vocab_size}
    check_fits(asked, **limits, length_param="tokens_to_generate", encoder=engine.encoder)
    return asked


def _prompts(fields: Fields, settings: ServerSettings) -> list[str]:
    if not fields.given("prompts"):
        old = "sentences is its old name" if fields.given("sentences") else ""
        hint = f" ({old})" if old else ""
        raise ServingError(f"prompts is required: a list of texts{hint}", param="prompts")
    found = fields.raw("prompts")
    if not isinstance(found, list):
        raise wrong_type("prompts", found, "a list of texts")
    high = min(settings.max_prompts, settings.max_sequences)
    if not 1 <= len(found) <= high:
        raise ServingError(
            f"prompts holds {len(found)} texts; 1..{high} are allowed (max_prompts)",
            param="prompts",
        )
    return [checked_text("prompts", text) for text in found]


def _sampling(fields: Fields, logprobs: bool) -> SamplingParams:
    temperature = fields.number("temperature", 1.0, low=0.0, high=MAX_TEMPERATURE)
    if temperature == 0:
        raise ServingError(
            f"temperature = 0: must lie in (0, {MAX_TEMPERATURE:g}]; top_k = 1 is greedy",
            param="temperature",
        )
    top_k = fields.integer("top_k", 0, low=0, high=MAX_TOP_K)
    top_p = fields.number("top_p", 0.0, low=0.0, high=1.0)
    if top_k > 0 and top_p > 0:
        raise ServingError("top_k and top_p cannot both be set", param="top_p")
    decay = fields.number("top_p_decay", 0.0, low=0.0, high=1.0)
    if fields.given("top_p_decay") and top_p == 0:
        raise ServingError("top_p_decay needs a top_p greater than 0", param="top_p_decay")
    bound = fields.number("top_p_bound", 0.0, low=0.0, high=1.0)
    if fields.given("top_p_bound") and not 0 < bound <= top_p:
        raise ServingError(
            f"top_p_bound = {bound:g}: must lie in (0, top_p = {top_p:g}]", param="top_p_bound"
        )
    return SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        top_p_decay=decay,
        top_p_bound=bound,
        logprobs=0 if logprobs else None,
    )


def _seeded(sampling: SamplingParams, seed: int | None) -> SamplingParams:
    return replace(sampling, seed=seed)


def _line_stop(fields: Fields) -> Literal["eol", "double_eol"] | None:
    double, single = fields.flag("stop_on_double_eol"), fields.flag("stop_on_eol")
    return "double_eol" if double else "eol" if single else None


def _beam(
    fields: Fields, engine: Engine, settings: ServerSettings, prompts: int, new_tokens: int
) -> BeamParams | None:
    width = fields.optional_integer(
        "beam_width", low=1, high=settings.max_beam_width, limit="max_beam_width"
    )
    if width is not None and prompts > 1:
        raise ServingError("beam search takes one prompt", param="beam_width")
    stop = fields.integer("stop_token", _end(engine), low=0, high=engine.vocab_size - 1)
    penalty = fields.number("length_penalty", 1.0, low=-MAX_PENALTY, high=MAX_PENALTY)
    if width is None:
        return None
    if new_tokens == 0:
        raise ServingError("beam search needs tokens to generate", param="tokens_to_generate")
    return BeamParams(width=width, length_penalty=penalty, stop_token=stop)


def _end(engine: Engine) -> int:
    """What ends a beam; decoders behind an encoder are taught to end with EOS."""
    tokenizer = engine.tokenizer
    return tokenizer.eod if engine.encoder is None or tokenizer.eos is None else tokenizer.eos


def _ids(engine: Engine, text: str, start: tuple[int, ...], number: int) -> tuple[int, ...]:
    framed = engine.encoder is not None
    ids = (*start, *encode(text, engine.tokenizer, "prompts", framed=framed))
    if not ids:
        raise ServingError(f"prompt {number} has no tokens", param="prompts")
    return ids


def answer(
    asked: GenerationRequest, outputs: list[SequenceOutput], engine: Engine
) -> dict[str, Any]:
    """Megatron's reply: whole texts, their pieces, and log-probabilities or beam scores. Of a
    model with an encoder what the decoder wrote, which does not go on with the prompt."""
    whole = [
        output.tokens if engine.encoder is not None else (*output.prompt, *output.tokens)
        for output in outputs
    ]
    segments = [pieces(engine.tokenizer, tokens) for tokens in whole]
    reply: dict[str, Any] = {
        "text": ["".join(p) for p in segments],
        "segments": segments,
        # Megatron's newer servers add the ids.
        "tokens": [list(tokens) for tokens in whole],
    }
    if asked.beam is not None:
        reply["scores"] = [output.score for output in outputs]
    else:
        wanted = asked.sampling.logprobs is not None
        reply["logprobs"] = [_values(o) for o in outputs] if wanted else None
    return reply


def _values(output: SequenceOutput) -> list[float]:
    return [item.logprob for item in (*output.prompt_logprobs, *output.logprobs)]
