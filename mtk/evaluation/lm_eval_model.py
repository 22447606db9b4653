"""A model of mtk's as lm-evaluation-harness sees it (extra ``eval``; imported only when used).

Token for token the conventions of the harness's own ``hf`` model: context and continuation are
encoded together and split, an empty context is BOS or the end of a document, what is too long
loses its beginning. So both give a request the same log-likelihood.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry, register_model

from mtk.convert.lazy import DTYPES
from mtk.convert.open_model import OpenedModel, open_model
from mtk.errors import ConfigError, DataError, Problem
from mtk.evaluation.perplexity import check_ids
from mtk.evaluation.scorer import Advance, Scorer
from mtk.evaluation.scoring import PAD, Request
from mtk.evaluation.text_ids import PrependBos, TextIds
from mtk.evaluation.windows import context_length, rolling

NAME = "mtk"
# New tokens where a task does not say how many, as in the harness.
NEW_TOKENS = 256


@dataclass(frozen=True)
class Continuation:
    """How texts are continued. until: the text ends before the first of these, or with the end
    of a document. temperature 0 is greedy; top_k 0 and top_p 0 are off."""

    max_tokens: int
    until: tuple[str, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0


# Prompts (ids) -> their continuations.
Generate = Callable[[Sequence[Sequence[int]], Continuation], list[str]]


class MtkModel(TemplateLM):  # type: ignore[misc]  # the harness is an extra, mypy may lack it
    """max_length: the longest context in tokens. generate: makes texts (it lives above this
    package). advance: told the sequences that are done. The harness sees one process; the ranks
    of ``scorer`` share every call, which all of them must make."""

    def __init__(
        self,
        scorer: Scorer,
        text: TextIds,
        generate: Generate,
        *,
        max_length: int,
        advance: Advance = lambda count: None,
    ) -> None:
        super().__init__()
        self.scorer, self.text, self.max_length = scorer, text, max_length
        self._generate, self._advance = generate, advance

    @property
    def eot_token_id(self) -> int:
        eos = self.text.tokenizer.eos
        return self.text.tokenizer.eod if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        return self.text.anchor

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **unused: Any
    ) -> list[int]:
        """Ids of ``string``; None adds BOS (if it is added at all) unless it is spelled out."""
        del unused
        spelled = string.startswith(self.text.tokenizer.decode([self.prefix_token_id]))
        bare = add_special_tokens is False or (add_special_tokens is None and spelled)
        ids = self.text.alone(string) if bare else self.text.whole(string)
        check_ids(ids, self.scorer.model, f"the text {string[:40]!r}")
        return ids

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding gives it) of every continuation."""
        del disable_tqdm
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **unused: Any
    ) -> list[tuple[float, bool]]:
        del unused
        cut = [self._request(*request) for request in requests]
        found = self.scorer.score(cut, self._advance)
        out = []
        for (strings, _, _), scored in zip(requests, found, strict=True):
            out.append((math.fsum(scored.log_probs), all(scored.greedy)))
            self.cache_hook.add_partial("loglikelihood", strings, out[-1])
        return out

    def _request(self, strings: Any, context: list[int], continuation: list[int]) -> Request:
        if not continuation or len(continuation) > self.max_length:
            raise DataError(
                f"the continuation {strings[1][:80]!r} has {len(continuation)} tokens; between 1 "
                f"and the context of {self.max_length} can be scored."
            )
        tokens = (context + continuation)[-(self.max_length + 1) :]
        return Request(tokens, len(tokens) - len(continuation))

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[float]:
        """Log-likelihood of whole texts, the first token predicted from BOS or the end of a
        document, in windows one behind the other."""
        del disable_tqdm
        cut: list[Request] = []
        counts = []
        for (string,) in (request.args for request in requests):
            ids = [self.prefix_token_id, *self.tok_encode(string)]
            windows = list(rolling(len(ids) - 1, self.max_length))
            cut += [Request(ids[w.start : w.start + w.length + 1], w.first + 1) for w in windows]
            counts.append(len(windows))
        found = iter(self.scorer.score(cut, self._advance))
        out = [
            math.fsum(p for _ in range(count) for p in next(found).log_probs) for count in counts
        ]
        for request, value in zip(requests, out, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return out

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Continuations, each up to the first of its stop strings."""
        del disable_tqdm
        alike: dict[Continuation, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[continuation(request.args[1])].append(number)
        texts: dict[int, str] = {}
        world = self.scorer.world
        for settings, numbers in alike.items():
            prompts = {n: self._prompt(requests[n].args[0], settings) for n in numbers}
            order = sorted(numbers, key=lambda n: (-len(prompts[n]), n))[world.rank :: world.size]
            found = self._generate([prompts[n] for n in order], settings) if order else []
            texts.update(zip(order, found, strict=True))
            self._advance(len(numbers))
        out = self.scorer.share(texts, len(requests))
        for request, text in zip(requests, out, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return out

    def _prompt(self, string: str, settings: Continuation) -> list[int]:
        room = self.max_length - settings.max_tokens
        if room < 1:
            rule = f"must exceed the {settings.max_tokens} new tokens that the task asks for"
            raise ConfigError([Problem("seq_length", self.max_length, rule)])
        return self.tok_encode(string)[-room:] or [self.prefix_token_id]


def continuation(given: Mapping[str, Any]) -> Continuation:
    """A task's ``generation_kwargs``. Raises ConfigError for those that mtk does not have."""
    left = dict(given)
    until = left.pop("until", None) or ()
    sample, temperature = left.pop("do_sample", None), float(left.pop("temperature", None) or 0.0)
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    limits = [value for name in names if (value := left.pop(name, None)) is not None]
    top_k, top_p = int(left.pop("top_k", None) or 0), float(left.pop("top_p", None) or 0.0)
    unknown = {name: value for name, value in left.items() if value not in (None, False)}
    if unknown:
        rule = "is not among what mtk's generation has for tasks of the harness"
        fix = "It has until, max_gen_toks, do_sample, temperature, top_k, top_p."
        raise ConfigError(
            [Problem(f"generation_kwargs.{name}", unknown[name], rule, fix) for name in unknown]
        )
    if sample is False:
        temperature = 0.0
    elif sample and not temperature:
        temperature = 1.0
    return Continuation(
        int(limits[0]) if limits else NEW_TOKENS,
        (until,) if isinstance(until, str) else tuple(until),
        temperature,
        top_k,
        top_p,
    )


def register(generator: Callable[[OpenedModel, int | None], Generate]) -> None:
    """Make the harness know ``model="mtk"``, with ``model_args`` as of :class:`_Registered`.

    generator: makes the ``generate`` of an opened model, for batches of at most so many rows. A
    second call changes nothing.
    """
    if NAME in model_registry:
        return

    @register_model(NAME)
    class Registered(MtkModel):
        """load: checkpoint, Hugging Face directory or quantised directory."""

        def __init__(
            self,
            load: str,
            dtype: str = "fp32",
            device: str | None = None,
            batch_tokens: int | None = None,
            batch_size: int | str | None = None,
            prepend_bos: PrependBos = "auto",
            max_length: int | None = None,
            max_batch_size: int | None = None,
        ) -> None:
            del max_batch_size
            place = device or ("cuda" if torch.cuda.is_available() else "cpu")
            if dtype not in DTYPES:
                rule = f"must be one of {', '.join(DTYPES)}"
                raise ConfigError([Problem("dtype", dtype, rule)])
            opened = open_model(load, dtype=DTYPES[dtype], device=place)
            opened.require_decoder("load", load)
            length = context_length(max_length, opened.config, opened.config.positions)
            # The harness's "auto:4" too: a budget of tokens finds the size by itself.
            found = "auto" if batch_size is None else str(batch_size)
            limit = None if found.startswith("auto") else int(found)
            scorer = Scorer(opened.model, PAD, batch_tokens=batch_tokens, batch_size=limit)
            text = TextIds(opened.tokenizer, prepend_bos)
            super().__init__(scorer, text, generator(opened, limit), max_length=length)
