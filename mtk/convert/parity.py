"""The certificate: two implementations of one model give the same logits, or nothing is
published.

A round trip through a converter proves only that it undoes itself; a fault made in both
directions survives it. So the converted files are run by an implementation that shares
no code with the converter.

Shape suffixes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtk.convert.reference_models import Comparable
from mtk.errors import GateError

PROMPTS, TOKENS, SEED = 8, 128, 20240229
# Tokens after the first that a window of attention hides.
BEYOND = 16
# Logits that spread less say nothing of the layers under them, e.g. with an output matrix of
# zeros: then the states have to agree too.
QUIET = 1e-2
LAST = "the final norm or the output matrix"


@dataclass(frozen=True)
class Parity:
    """Figures over all positions of all prompts; errors are absolute, in logits.

    limit: what the largest error may be: the tolerance, less for models whose logits
    spread (standard deviation) less than 1, since there the same error means more; under
    ``QUIET`` the states are compared too, as shares of the largest.
    kl: mean of KL(reference || candidate) per position, in nats. loss: mean
    cross-entropy of each prompt's own next tokens. first_difference: the first part
    of the model whose output differs; None if all agree.
    """

    candidate: str
    reference: str
    prompts: int
    tokens_per_prompt: int
    longest_prompt: int
    seed: int
    stored_dtype: str
    max_abs_logit_error: float
    mean_abs_logit_error: float
    logit_spread: float
    tolerance: float
    limit: float
    top1_agreement: float
    kl: float
    loss_candidate: float
    loss_reference: float
    loss_difference: float
    worst: str
    first_difference: str | None
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        return {"format": "mtk-parity", "version": 1, **asdict(self)}


def fixed_prompts(vocab_size: int, positions: int, seed: int = SEED) -> Tensor:
    """int64 [PROMPTS, S] of ids in the true vocabulary, the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    length = min(TOKENS, positions)
    return torch.randint(vocab_size, (PROMPTS, length), generator=generator)


def past_the_window(
    vocab_size: int, positions: int, window: int | None, seed: int = SEED
) -> Tensor | None:
    """int64 [1, S]: a prompt that is longer than the ``window`` of attention, where those of
    :func:`fixed_prompts` would not show a wrong one; None where they do, and where no sequence
    is long enough for the window to matter."""
    if window is None or window + BEYOND <= min(TOKENS, positions) or window >= positions:
        return None
    length = min(window + BEYOND, positions)
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randint(vocab_size, (1, length), generator=generator)


def compare(
    candidate: Comparable,
    reference: Comparable,
    tokens_BS: Tensor,
    *,
    tolerance: float,
    stored_dtype: str,
    longer: Tensor | None = None,
) -> Parity:
    """Run both on every prompt, one prompt at a time, and on the ``longer`` one [1, S]."""
    sums = _Sums(tolerance)
    prompts = [*torch.split(tokens_BS, 1), *([] if longer is None else [longer])]
    for index, prompt_1S in enumerate(prompts):
        sums.add(index, prompt_1S, candidate, reference)
    spread = sums.spread()
    limit = tolerance * min(1.0, max(spread, QUIET)) if math.isfinite(spread) else tolerance
    # Written so that NaN fails.
    passed = sums.shape_problem is None and sums.max_error <= limit
    if passed and spread < QUIET and sums.parted is not None:
        passed, sums.first_difference = False, sums.parted
    count = max(sums.positions, 1)
    predicted = max(sums.predicted, 1)
    return Parity(
        candidate=candidate.name,
        reference=reference.name,
        prompts=len(prompts),
        tokens_per_prompt=tokens_BS.shape[1],
        longest_prompt=prompts[-1].shape[1],
        seed=SEED,
        stored_dtype=stored_dtype,
        max_abs_logit_error=sums.max_error,
        mean_abs_logit_error=sums.error_sum / max(sums.values, 1),
        logit_spread=spread,
        tolerance=tolerance,
        limit=limit,
        top1_agreement=sums.agreed / count,
        kl=sums.kl / count,
        loss_candidate=sums.loss_candidate / predicted,
        loss_reference=sums.loss_reference / predicted,
        loss_difference=(sums.loss_candidate - sums.loss_reference) / predicted,
        worst=sums.worst,
        first_difference=None if passed else (sums.shape_problem or sums.first_difference),
        passed=passed,
    )


def require(parity: Parity) -> None:
    """Raises GateError, saying where the two part, unless the check passed."""
    if not parity.passed:
        raise GateError(
            f"{parity.candidate} and {parity.reference} differ on the converted model: largest "
            f"logit error {parity.max_abs_logit_error:.3g} ({parity.worst}), allowed "
            f"{parity.limit:.3g} (tolerance {parity.tolerance:g}); same top token at "
            f"{parity.top1_agreement:.1%} of positions; first difference: "
            f"{parity.first_difference}. Nothing was published."
        )


class _Sums:
    """Running figures; float64, NaN is kept."""

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.max_error, self.error_sum, self.values = 0.0, 0.0, 0
        self.agreed, self.kl, self.positions = 0, 0.0, 0
        self.loss_candidate, self.loss_reference, self.predicted = 0.0, 0.0, 0
        self.total, self.squares = 0.0, 0.0
        self.worst = "none"
        self.first_difference: str | None = None
        # The first part whose states differ by more than the tolerance's share of them.
        self.parted: str | None = None
        self.shape_problem: str | None = None

    def spread(self) -> float:
        if not self.values:
            return math.nan
        mean = self.total / self.values
        return math.sqrt(max(self.squares / self.values - mean**2, 0.0))

    def add(
        self, index: int, tokens_BS: Tensor, candidate: Comparable, reference: Comparable
    ) -> None:
        ours_BSV, our_states = candidate.forward(tokens_BS)
        theirs_BSV, their_states = reference.forward(tokens_BS)
        if ours_BSV.shape != theirs_BSV.shape:
            shapes = f"{list(ours_BSV.shape)} and {list(theirs_BSV.shape)}"
            self.shape_problem = f"logits have shapes {shapes}"
            self.max_error = math.inf
            return
        error_SV = (ours_BSV - theirs_BSV)[0].double().abs()
        largest = error_SV.max().item()
        if largest > self.max_error or (math.isnan(largest) and not math.isnan(self.max_error)):
            self.max_error = largest
            place = int(error_SV.amax(dim=1).argmax())
            self.worst = f"prompt {index}, position {place}"
            self.first_difference = first_difference(our_states, their_states)
        parted = first_difference(our_states, their_states, self.tolerance)
        self.parted = self.parted or (None if parted == LAST else parted)
        self.error_sum += error_SV.sum().item()
        self.values += error_SV.numel()
        self.total += theirs_BSV.double().sum().item()
        self.squares += theirs_BSV.double().square().sum().item()
        self._add_predictions(ours_BSV[0].double(), theirs_BSV[0].double(), tokens_BS[0])

    def _add_predictions(self, ours_SV: Tensor, theirs_SV: Tensor, tokens_S: Tensor) -> None:
        self.agreed += int((ours_SV.argmax(-1) == theirs_SV.argmax(-1)).sum())
        self.positions += ours_SV.shape[0]
        our_logs, their_logs = ours_SV.log_softmax(-1), theirs_SV.log_softmax(-1)
        self.kl += F.kl_div(our_logs, their_logs, reduction="sum", log_target=True).item()
        if len(ours_SV) != len(tokens_S):  # the head of a task predicts no tokens
            return
        self.predicted += len(tokens_S) - 1
        self.loss_candidate += F.nll_loss(our_logs[:-1], tokens_S[1:], reduction="sum").item()
        self.loss_reference += F.nll_loss(their_logs[:-1], tokens_S[1:], reduction="sum").item()


def first_difference(ours: list[Tensor], theirs: list[Tensor], share: float = 1e-5) -> str:
    """The first part whose output differs by more than rounding, a ``share`` of its largest
    value."""
    if len(ours) != len(theirs):
        return f"the numbers of layers, {len(ours) - 1} and {len(theirs) - 1}"
    for index, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        part = "the embedding" if index == 0 else f"layer {index - 1}"
        if our.shape != their.shape:
            return f"{part} (shapes {list(our.shape)} and {list(their.shape)})"
        scale = their.float().abs().max().item()
        if not (our.float() - their.float()).abs().max().item() <= share * max(scale, 1e-6):
            return part
    return LAST
