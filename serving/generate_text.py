"""Continue texts with a trained model from Python, without a server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from mtk.convert.open_model import OpenedModel, open_model
from mtk.errors import ServingError
from serving.beam import outputs, search
from serving.generation import Decoder, Vocabulary, generate
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
    """The texts that follow ``prompts``, in their order; of a beam search the best one.

    model: a checkpoint, a Hugging Face directory or a model already opened. ``temperature=0``
    or ``top_k=1`` is greedy; ``top_p`` is multiplied by ``top_p_decay`` after each token and
    kept above ``top_p_bound`` (Lee et al. 2022); ``num_beams`` > 1 searches with the score
    log-probability / length^``length_penalty``. ``add_BOS`` begins each prompt with the
    end-of-document token, as Megatron-LM does. Raises ServingError for values out of range and
    prompts that do not fit, ArtifactError for a model without a tokenizer.
    """
    opened = model if isinstance(model, OpenedModel) else open_model(model)
    tokenizer, config = opened.tokenizer, opened.config
    ends = frozenset(token for token in (tokenizer.eod, tokenizer.eos) if token is not None)
    if (add_BOS or num_beams > 1) and tokenizer.eod is None:
        raise ServingError("the tokenizer has no end of document", param="add_BOS")
    start = (tokenizer.eod or 0,) if add_BOS else ()
    request = GenerationRequest(
        prompts=tuple((*start, *tokenizer.encode(prompt)) for prompt in prompts),
        max_tokens=max_new_tokens,
        sampling=SamplingParams(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            top_p_decay=top_p_decay,
            top_p_bound=top_p_bound,
            seed=seed,
        ),
        stop=StopRules(token_ids=ends),
    )
    vocab = config.vocab_size or tokenizer.vocab_size
    check_fits(request, context=config.positions, vocab=vocab)
    if num_beams == 1:
        return [output.text for output in generate(opened.model, tokenizer, request)]
    beam = BeamParams(width=num_beams, length_penalty=length_penalty, stop_token=tokenizer.eod or 0)
    return [_best(opened, request, prompt, beam) for prompt in request.prompts]


def _best(
    opened: OpenedModel, request: GenerationRequest, prompt: tuple[int, ...], beam: BeamParams
) -> str:
    one = GenerationRequest(prompts=(prompt,), max_tokens=request.max_tokens, beam=beam)
    vocabulary = Vocabulary(
        opened.tokenizer, opened.config.vocab_size or opened.tokenizer.vocab_size
    )
    steps = search(Decoder(opened.model), vocabulary, one)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return outputs(one, vocabulary, end.value)[0].text
