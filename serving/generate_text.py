"""Continue texts with a trained model from Python, without a server."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch

from mtk.convert.open_model import OpenedModel, open_model
from mtk.errors import ServingError
from mtk.evaluation.text_ids import TextIds
from mtk.tokenizers import Tokenizer
from serving.beam import outputs, search
from serving.encoder_prompt import EncoderPrompt, refuse_for_encoder, unlimited_prompt
from serving.generation import Vocabulary, decoder_for, generate
from serving.requests import BeamParams, GenerationRequest, StopRules, check_fits
from serving.sampling import SamplingParams


@torch.inference_mode()
def generate_text(
    model: str | Path | OpenedModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.0,
    top_p_decay: float = 0.0,
    top_p_bound: float = 0.0,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    add_BOS: bool = False,
    seed: int | None = None,
) -> list[str]:
    """The texts that follow ``prompts``, in their order; of a beam search the best one. A T5 reads
    them with its encoder, as its tokenizer frames them (EOS behind them), and writes the texts.

    model: a checkpoint, a Hugging Face directory or a model already opened. ``temperature=0``
    or ``top_k=1`` is greedy; ``top_p`` is multiplied by ``top_p_decay`` after each token and
    kept above ``top_p_bound`` (Lee et al. 2022); ``num_beams`` > 1 searches with the score
    log-probability / length^``length_penalty``. Prompts begin with BOS where transformers puts it
    with this tokenizer, or with ``add_BOS`` with the end-of-document token, as in Megatron-LM.
    Raises ServingError for values out of range or without effect and prompts that do not fit,
    ConfigError for a model that writes no text, ArtifactError for one without
    a tokenizer.
    """
    sampling = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        top_p_decay=top_p_decay,
        top_p_bound=top_p_bound,
        seed=seed,
    )
    _check(prompts, max_new_tokens, sampling, num_beams, length_penalty)
    opened = model if isinstance(model, OpenedModel) else open_model(model)
    opened.require_generator("model", str(opened.folder))
    tokenizer, config = opened.tokenizer, opened.config
    encoder = unlimited_prompt(config, tokenizer)
    ids = _ids(prompts, tokenizer, encoder, add_BOS)
    ends = frozenset(token for token in (tokenizer.eod, tokenizer.eos) if token is not None)
    request = GenerationRequest(
        prompts=tuple(ids),
        max_tokens=max_new_tokens,
        sampling=sampling,
        stop=StopRules(token_ids=ends),
    )
    context = config.positions if config.positions_are_limited else sys.maxsize
    vocab = config.vocab_size or tokenizer.vocab_size
    check_fits(request, context=context, vocab=vocab, encoder=encoder)
    if num_beams == 1:
        return [output.text for output in generate(opened.model, tokenizer, request)]
    stop = tokenizer.eod if encoder is None or tokenizer.eos is None else tokenizer.eos
    beam = BeamParams(width=num_beams, length_penalty=length_penalty, stop_token=stop)
    return [_best(opened, request, prompt, beam) for prompt in request.prompts]


def _ids(
    prompts: Sequence[str], tokenizer: Tokenizer, encoder: EncoderPrompt | None, add_bos: bool
) -> list[tuple[int, ...]]:
    if encoder is not None:
        if add_bos:
            refuse_for_encoder(encoder, "add_BOS", "a token in front of its continuation")
        return [tuple(tokenizer.encode_framed(prompt)) for prompt in prompts]
    text = TextIds(tokenizer)
    if add_bos:
        return [(tokenizer.eod, *text.alone(prompt)) for prompt in prompts]
    return [tuple(text.whole(prompt)) for prompt in prompts]


def _check(
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: SamplingParams,
    num_beams: int,
    length_penalty: float,
) -> None:
    if isinstance(prompts, str):
        raise ServingError("prompts is one text; give a list of texts", param="prompts")
    for param, value in (("max_new_tokens", max_new_tokens), ("num_beams", num_beams)):
        if value < 1:
            raise ServingError(f"{param} = {value}: must be at least 1", param=param)
    if num_beams == 1 and length_penalty != 1.0:
        text = f"length_penalty = {length_penalty}: needs num_beams greater than 1"
        raise ServingError(text, param="length_penalty")
    if num_beams > 1 and not sampling.greedy:
        for field in fields(sampling):
            value = getattr(sampling, field.name)
            if value != field.default:
                text = f"{field.name} = {value}: a beam search draws nothing; leave one of them out"
                raise ServingError(text, param=field.name)


def _best(
    opened: OpenedModel, request: GenerationRequest, prompt: tuple[int, ...], beam: BeamParams
) -> str:
    one = GenerationRequest(prompts=(prompt,), max_tokens=request.max_tokens, beam=beam)
    encoder = unlimited_prompt(opened.config, opened.tokenizer)
    size = opened.config.vocab_size or opened.tokenizer.vocab_size
    vocabulary = Vocabulary(opened.tokenizer, size, continues=encoder is None)
    steps = search(decoder_for(opened.model, encoder), vocabulary, one)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return outputs(one, vocabulary, end.value)[0].text
