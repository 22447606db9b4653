"""What is asked of an engine, and what comes back while it works."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mtk.errors import ServingError
from serving.encoder_prompt import EncoderPrompt, refuse_for_encoder
from serving.guides import Guide
from serving.sampling import SamplingParams

FinishReason = Literal["stop", "length"]
# length^20 and length^-20 are finite and not zero for any context there is.
MAX_PENALTY = 20.0


@dataclass(frozen=True, kw_only=True)
class StopRules:
    """When a sequence ends before ``max_tokens``.

    token_ids: any of these ends it. strings: text ends before the first of these. line:
    ends with the token that brings a newline ("eol") or an empty line ("double_eol").
    """

    token_ids: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()
    line: Literal["eol", "double_eol"] | None = None


@dataclass(frozen=True, kw_only=True)
class BeamParams:
    """Beam search: ``width`` beams, score = sum of log-probabilities / length^length_penalty."""

    width: int
    length_penalty: float
    stop_token: int

    def __post_init__(self) -> None:
        """Raises ServingError (400) that names the field and its range."""
        if self.width < 1:
            raise ServingError(f"width = {self.width}: must be at least 1", param="num_beams")
        # Written so that NaN violates too.
        if not abs(self.length_penalty) <= MAX_PENALTY:
            rule = f"must lie in [-{MAX_PENALTY:g}, {MAX_PENALTY:g}]"
            text = f"length_penalty = {self.length_penalty!r}: {rule}"
            raise ServingError(text, param="length_penalty")


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One call of a client: every prompt is continued ``samples`` times.

    prompts: token ids, none empty. max_tokens: new tokens a sequence; 0 only scores the
    prompts. prompt_logprobs: also for the prompts' tokens. newline_after_colon: False
    keeps a newline from following a colon. stream: deltas are wanted, not only the end.
    guide: changes logits before a token is chosen (not in beam search).
    """

    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: StopRules = field(default_factory=StopRules)
    samples: int = 1
    prompt_logprobs: bool = False
    newline_after_colon: bool = True
    beam: BeamParams | None = None
    stream: bool = False
    guide: Guide | None = None

    @property
    def sequences(self) -> int:
        return len(self.prompts) * self.samples


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a token from the raw logits. top: likeliest (id, value) first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Delta:
    """One step of one sequence. index: prompt number x samples + sample number.

    text: what became certain, possibly "". finish: set in the sequence's last delta.
    prompt_logprobs: in the first delta, if they were asked for.
    """

    index: int
    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class SequenceOutput:
    """A finished sequence.

    tokens: new ids, a stop token included. text: of the new tokens, without stop token or
    stop string. prompt_logprobs: for prompt tokens 1.. (the first has none). score: of a
    beam. steps: the text that each new token brought; joined they are ``text``.
    """

    index: int
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str
    steps: tuple[str, ...]
    finish: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    score: float | None = None


def check_fits(
    request: GenerationRequest,
    *,
    context: int,
    vocab: int,
    length_param: str = "max_tokens",
    encoder: EncoderPrompt | None = None,
) -> None:
    """Ids inside the vocabulary and prompt + new tokens inside the context; with an encoder the
    prompt inside the encoder's and new tokens inside ``context``.

    Raises ServingError (400) with the numbers; a length is blamed on ``length_param``.
    """
    if request.prompt_logprobs:
        refuse_for_encoder(encoder, "prompt_logprobs", "log-probabilities of the prompt")
    for number, prompt in enumerate(request.prompts):
        if not prompt:
            raise ServingError(f"prompt {number} has no tokens", param="prompt")
        bad = next((token for token in prompt if not 0 <= token < vocab), None)
        if bad is not None:
            raise ServingError(
                f"prompt {number} holds token id {bad}; ids lie in 0..{vocab - 1}", param="prompt"
            )
        check_length(len(prompt), request.max_tokens, context, length_param, encoder)
    beam = request.beam
    if beam is not None and not 0 <= beam.stop_token < vocab:
        raise ServingError(
            f"stop_token = {beam.stop_token}: ids lie in 0..{vocab - 1}", param="stop_token"
        )


def check_length(
    prompt: int, new: int, context: int, param: str, encoder: EncoderPrompt | None = None
) -> None:
    """Raises ServingError (400) if ``prompt + new`` tokens exceed the context, or with an encoder
    one of them its own limit."""
    if encoder is not None:
        _check_sides(prompt, new, context, param, encoder)
        return
    if prompt + new > context:
        room = max(0, context - prompt)
        raise ServingError(
            f"This model's maximum context length is {context} tokens, but {prompt + new} were "
            f"requested ({prompt} in the prompt, {new} to generate). Shorten the prompt or ask "
            f"for at most {room} tokens.",
            param=param,
        )


def _check_sides(prompt: int, new: int, context: int, param: str, encoder: EncoderPrompt) -> None:
    if prompt > encoder.context:
        raise ServingError(
            f"This model's encoder reads at most {encoder.context} tokens, but the prompt has "
            f"{prompt}. Shorten the prompt.",
            param="prompt",
        )
    if new > context:
        raise ServingError(
            f"This model's decoder writes at most {context} tokens, but {new} were requested. Ask "
            f"for at most {context}.",
            param=param,
        )
