"""Who is missing: a sentence from what the ranks were last seen doing.

A rank inside a collective waits for the members of its group that are not in the same call.
Those that wait themselves are followed further; what remains are the ranks that everybody
waits for, directly or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mtk.launch.trace import Sight

LISTED = 8  # ranks that a message names before it only counts them


@dataclass(frozen=True)
class RankState:
    """sight: None where nothing is known. gone: why the rank will never come, "" if it may;
    note: what else is known, e.g. that it is stopped."""

    sight: Sight | None = None
    groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    gone: str = ""
    note: str = ""


def explain(states: Mapping[int, RankState]) -> str:
    """One to a few sentences without a final full stop, by rank; "" when all is quiet."""
    absent = {rank: _absent(rank, states) for rank in states if _waits(states[rank])}
    if not absent:
        return _by_phase(states)
    wanted = {other for others in absent.values() for other in others}
    culprits = sorted(wanted - set(absent))
    if culprits:
        shown = [_culprit(rank, absent, states) for rank in culprits[:LISTED]]
        if len(culprits) > LISTED:
            shown.append(f"and {len(culprits) - LISTED} more ranks")
        return "; ".join(shown)
    if any(absent.values()):
        shown = [f"rank {rank} in {_call(states[rank])}" for rank in sorted(absent)[:LISTED]]
        return f"the ranks wait for each other: {', '.join(shown)}"
    first = min(absent, key=lambda rank: -_sight(states[rank]).age)
    return (
        f"every member of the group is in {_call(states[first])} for "
        f"{_sight(states[first]).age:.0f} s and it does not end: the connection or a device hangs"
    )


def missing(states: Mapping[int, RankState]) -> list[int]:
    """The ranks that :func:`explain` names as missing; empty when that cannot be told."""
    absent = {rank: _absent(rank, states) for rank in states if _waits(states[rank])}
    if absent:
        return sorted({other for others in absent.values() for other in others} - set(absent))
    return _behind(states)


def _waits(state: RankState) -> bool:
    return state.sight is not None and state.sight.inside and not state.gone


def _sight(state: RankState) -> Sight:
    return state.sight or Sight()


def _members(rank: int, states: Mapping[int, RankState]) -> tuple[int, ...]:
    """Of the group that ``rank`` waits in; all ranks where it did not tell."""
    return tuple(states[rank].groups.get(_sight(states[rank]).group, sorted(states)))


def _absent(rank: int, states: Mapping[int, RankState]) -> list[int]:
    """The members of its group that are not in the call that ``rank`` waits in."""
    own = _sight(states[rank])

    def there(other: int) -> bool:
        state = states.get(other, RankState())
        seen = _sight(state)
        same = (seen.site, seen.group, seen.call) == (own.site, own.group, own.call)
        return _waits(state) and same

    return [other for other in _members(rank, states) if other != rank and not there(other)]


def _culprit(rank: int, absent: Mapping[int, list[int]], states: Mapping[int, RankState]) -> str:
    """``rank 2 never entered 'tp.row' (...); it was last seen ...; rank 3 waited 60 s``."""
    waiting = sorted(other for other, missed in absent.items() if rank in missed)
    first = max(waiting, key=lambda other: _sight(states[other]).age)
    own = _sight(states[first])
    members = ", ".join(map(str, _members(first, states)[:LISTED]))
    more = ", ..." if len(_members(first, states)) > LISTED else ""
    where = f"(group {own.group}: ranks {members}{more}; call {own.call})"
    return (
        f"rank {rank} never entered '{own.site}' {where}; {last_seen(states.get(rank))}; "
        f"{_ranks(waiting)} waited {own.age:.0f} s"
    )


def last_seen(state: RankState | None) -> str:
    """``it was last seen in 'data.next' 61 s ago``."""
    if state is None or state.sight is None:
        return "nothing is known of it" + (f": it {state.gone}" if state and state.gone else "")
    if state.gone:
        return f"it {state.gone}"
    seen, note = state.sight, f" and {state.note}" if state.note else ""
    if seen.inside:
        return f"it is in {_call(state)} for {seen.age:.0f} s{note}"
    if seen.phases and (not seen.call or seen.phase_age < seen.age):
        return f"it was last seen in '{seen.phase}' {seen.phase_age:.0f} s ago{note}"
    if seen.call:
        phase = f" in '{seen.phase}'" if seen.phases else ""
        return f"it was last seen leaving {_call(state)}{phase} {seen.age:.0f} s ago{note}"
    return f"it has not entered any collective yet{note}"


def _call(state: RankState) -> str:
    seen = _sight(state)
    return f"'{seen.site}' (group {seen.group}, call {seen.call})"


def _by_phase(states: Mapping[int, RankState]) -> str:
    """Nobody is in a named collective: torch's own one, then; the ranks behind are named."""
    behind = _behind(states)
    if not behind:
        seen = [f"rank {rank}: {last_seen(states[rank])}" for rank in sorted(states)[:LISTED]]
        known = any(state.sight is not None for state in states.values())
        return "no rank is in a named collective; " + "; ".join(seen) if known else ""
    ahead = [rank for rank in states if rank not in behind]
    first = min(ahead, key=lambda rank: _sight(states[rank]).phases)
    far, near = _sight(states[first]), _sight(states[behind[0]])
    reached = f"'{far.phase}'" if far.phases > near.phases else _call(states[first])
    shown = [f"rank {rank} is behind: {last_seen(states[rank])}" for rank in behind[:LISTED]]
    return "; ".join(shown) + f"; {_ranks(ahead)} went on to {reached}"


def _behind(states: Mapping[int, RankState]) -> list[int]:
    """The ranks that began fewest phases or, all in the same one, made fewest calls in their
    common group: on GPUs a rank leaves a collective before it is done."""
    gone = sorted(rank for rank, state in states.items() if state.gone)
    if gone:
        return gone
    seen = {rank: state.sight for rank, state in states.items() if state.sight}
    for counts in (
        {rank: sight.phases for rank, sight in seen.items()},
        {rank: sight.call for rank, sight in seen.items()}
        if len({sight.group for sight in seen.values()}) == 1
        else {},
    ):
        behind = sorted(r for r, count in counts.items() if count == min(counts.values()))
        if 0 < len(behind) < len(states):
            return behind
    return []


def _ranks(ranks: Iterable[int]) -> str:
    ranks = sorted(ranks)
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    more = f" and {len(ranks) - LISTED} more" if len(ranks) > LISTED else ""
    return f"ranks {', '.join(map(str, ranks[:LISTED]))}{more}"
