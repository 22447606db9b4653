"""Orders of work in a pipeline: 1F1B, interleaved, zero-bubble, and the V of zero-bubble.

Every rank works out the programs of all ranks by playing the schedule on a clock (forward
and each half of backward take one tick). The clock also numbers the messages between ranks:
each rank posts its sends and receives in the order of these numbers. A message only depends
on messages with smaller numbers, so the programs cannot dead-lock, not even where all
traffic of a rank shares one queue and a send waits for its receive, as on NCCL.

1F1B and interleaved: Narayanan et al. 2021; zero-bubble (its memory-neutral form) and the
V placement: Qi et al. 2023, 2024. Micro-batches go through in rounds of about as many as
there are ranks, so that any number of them is allowed.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from itertools import pairwise, takewhile
from typing import Literal, NamedTuple

# Backward in two parts: gradients of inputs first, of weights when there is time.
SPLIT_BACKWARD = ("zero-bubble", "zbv")

Kind = Literal["forward", "backward", "weight"]
Program = list["Action | Message"]


class Action(NamedTuple):
    """Work of one stage on one micro-batch. weight: the delayed part of its backward."""

    kind: Kind
    stage: int
    micro: int


class Message(NamedTuple):
    """States or gradients on their way from ``stage`` to a neighbour stage on rank ``peer``
    (``sent``) or from there to ``stage``. kind: the pass that needs it."""

    sent: bool
    kind: Kind
    stage: int
    micro: int
    peer: int


class _Mail(NamedTuple):
    """A message on the clock: sorts by time, then sender."""

    time: int
    sender: int
    receiver: int
    kind: Kind
    to_stage: int
    micro: int


def programs(
    schedule: str, placement: Sequence[int], micro_batches: int, *, training: bool = True
) -> list[Program]:
    """What each rank does in one step, messages included.

    placement: the rank of each stage. Without ``training`` forward passes only. Raises
    ValueError for a placement that the schedule cannot use.
    """
    ranks = max(placement) + 1
    split = training and schedule in SPLIT_BACKWARD
    orders, limit = _orders(schedule, placement, ranks, micro_batches, training)
    clock = _Clock(orders, placement, split=split, limit=limit)
    clock.play()
    return [
        _with_messages(rank, actions, placement, clock.mails)
        for rank, actions in enumerate(clock.played)
    ]


def _orders(
    schedule: str, placement: Sequence[int], ranks: int, count: int, training: bool
) -> tuple[list[list[Action]], int]:
    """Forward and backward passes of each rank in order, and how many (stage, micro-batch)
    a rank may keep activations of."""
    own = [[s for s, place in enumerate(placement) if place == rank] for rank in range(ranks)]
    if schedule == "zbv":
        if any(len(stages) != 2 for stages in own):
            raise ValueError("zbv runs exactly two stages on each rank")
        orders = [_v_order(rank, ranks, own[rank], count) for rank in range(ranks)]
        return (orders, 2 * ranks) if training else (_forward_only(orders), len(placement) * count)
    rounds = _rounds(ranks, count)
    forward = [[Action("forward", *p) for p in _passes(own[r], rounds)] for r in range(ranks)]
    if not training:
        return forward, len(placement) * count
    chunks = len(own[0])
    lead = (chunks - 1) * len(rounds[0])
    hop = 2 if chunks > 1 and schedule == "interleaved" else 1
    orders = []
    for rank in range(ranks):
        backward = [Action("backward", *p) for p in _passes(own[rank][::-1], rounds)]
        warmup = min(lead + hop * (ranks - 1 - rank), len(forward[rank]))
        orders.append(_one_by_one(forward[rank], backward, warmup))
    return orders, lead + hop * (ranks - 1) + 1


def _forward_only(orders: list[list[Action]]) -> list[list[Action]]:
    return [[action for action in order if action.kind == "forward"] for order in orders]


def _rounds(ranks: int, count: int) -> list[range]:
    """Micro-batches cut into rounds of at least ``ranks`` where there are so many."""
    rounds = max(1, count // ranks)
    size, rest = divmod(count, rounds)
    ends = [0]
    for index in range(rounds):
        ends.append(ends[-1] + size + (index < rest))
    return [range(a, b) for a, b in pairwise(ends)]


def _passes(stages: Sequence[int], rounds: Sequence[range]) -> list[tuple[int, int]]:
    """(stage, micro-batch) in the order of a rank: a round through one stage, then the next."""
    return [(stage, micro) for r in rounds for stage in stages for micro in r]


def _one_by_one(forward: list[Action], backward: list[Action], warmup: int) -> list[Action]:
    """``warmup`` forward passes, then one forward and one backward in turn, then the rest."""
    order = forward[:warmup]
    for ahead, behind in zip(forward[warmup:], backward, strict=False):
        order += (ahead, behind)
    return order + backward[len(forward) - warmup :]


def _v_order(rank: int, ranks: int, stages: Sequence[int], count: int) -> list[Action]:
    """The V schedule of Qi et al. 2024; with fewer micro-batches than fill it, some are left
    out."""
    down, up = stages
    full = max(2 * ranks - 1, count)
    order: list[tuple[Kind, int]] = [("forward", down)] * (2 * (ranks - rank) - 1)
    order += [("forward", up), ("forward", down)] * rank
    order += [("forward", up), ("backward", up)] * (ranks - rank)
    started, turned = 2 * ranks - 1 - rank, ranks
    while turned < started or started < full:
        if started < full:
            order.append(("forward", down))
            started += 1
        order += [("backward", down), ("forward", up), ("backward", up)]
        turned += 1
    order += [("backward", down), ("backward", up)] * rank
    order += [("backward", down)] * (ranks - rank)
    seen: dict[tuple[Kind, int], int] = {}
    actions = []
    for kind, stage in order:
        micro = seen.get((kind, stage), 0)
        seen[kind, stage] = micro + 1
        actions.append(Action(kind, stage, micro))
    return [action for action in actions if action.micro < count]


# Held activations after an action: backward in one part, and in two.
_WHOLE = {"forward": 1, "backward": -1, "weight": 0}
_SPLIT = {"forward": 1, "backward": 0, "weight": -1}


class _Clock:
    """Plays the orders: one tick for forward and for each half of backward.

    played: the work of each rank, with delayed weight gradients put where it would wait or
    hold too much. mails: the messages, sorted at the end.
    """

    def __init__(
        self, orders: list[list[Action]], placement: Sequence[int], *, split: bool, limit: int
    ) -> None:
        self.placement, self.split, self.limit = placement, split, limit
        self.todo = [deque(order) for order in orders]
        self.delayed: list[deque[Action]] = [deque() for _ in orders]
        self.held, self.busy_until = [0] * len(orders), [0] * len(orders)
        self.played: list[list[Action]] = [[] for _ in orders]
        self.done: dict[Action, int] = {}
        self.mails: list[_Mail] = []
        self.events = [(0, rank) for rank in range(len(orders))]

    def play(self) -> None:
        """Raises ValueError where the ranks wait for each other for ever."""
        while self.events:
            now, rank = heapq.heappop(self.events)
            action = self._next(rank, now) if now >= self.busy_until[rank] else None
            if action is not None:
                self._run(action, rank, now)
        if any(self.todo):
            raise ValueError(f"the schedule stops before {[o[0] for o in self.todo if o]}")
        self.mails.sort()

    def _next(self, rank: int, now: int) -> Action | None:
        queue, delayed = self.todo[rank], self.delayed[rank]
        ready = bool(queue) and self._ready(queue[0], now)
        full = ready and queue[0].kind == "forward" and self.held[rank] >= self.limit
        if delayed and (full or not ready):
            return delayed.popleft()
        return queue.popleft() if ready else None

    def _ready(self, action: Action, now: int) -> bool:
        last = len(self.placement) - 1
        if action.kind == "forward":
            if action.stage == 0:
                return True
            needed = action._replace(stage=action.stage - 1)
        elif action.stage == last:
            needed = action._replace(kind="forward")
        else:
            needed = action._replace(stage=action.stage + 1)
        return self.done.get(needed, now + 1) <= now

    def _run(self, action: Action, rank: int, now: int) -> None:
        whole = action.kind == "backward" and not self.split
        time = now + (2 if whole else 1)
        self.played[rank].append(action)
        self.done[action] = self.busy_until[rank] = time
        self.held[rank] += (_SPLIT if self.split else _WHOLE)[action.kind]
        heapq.heappush(self.events, (time, rank))
        if action.kind == "weight":
            return
        if action.kind == "backward" and self.split:
            self.delayed[rank].append(action._replace(kind="weight"))
        to = action.stage + (1 if action.kind == "forward" else -1)
        if 0 <= to < len(self.placement) and self.placement[to] != rank:
            receiver = self.placement[to]
            self.mails.append(_Mail(time, rank, receiver, action.kind, to, action.micro))
            heapq.heappush(self.events, (time, receiver))


def _with_messages(
    rank: int, actions: list[Action], placement: Sequence[int], mails: list[_Mail]
) -> Program:
    """Put the rank's messages among its work, in the order of their numbers.

    A receive is posted one action before the one that needs it, so that the message travels
    meanwhile; a send right after the action that made it.
    """
    place = {action: index for index, action in enumerate(actions)}
    queue = deque(mail for mail in mails if rank in (mail.sender, mail.receiver))
    program: Program = []

    def receive(count: int) -> None:
        for mail in [queue.popleft() for _ in range(count)]:
            program.append(Message(False, mail.kind, mail.to_stage, mail.micro, mail.sender))

    def waiting() -> list[int]:
        """Of each receive before the next send: the place of the action that needs it."""
        ahead = takewhile(lambda mail: mail.receiver == rank, queue)
        return [place[Action(mail.kind, mail.to_stage, mail.micro)] for mail in ahead]

    for index, action in enumerate(actions):
        soon = [number for number, at in enumerate(waiting(), 1) if at <= index + 1]
        receive(max(soon, default=0))
        program.append(action)
        before = len(waiting())
        if before < len(queue) and _made_by(queue[before], action):
            receive(before)
            program.append(Message(True, *action, peer=queue.popleft().receiver))
    return program


def _made_by(mail: _Mail, action: Action) -> bool:
    step = {"forward": 1, "backward": -1, "weight": 0}[action.kind]
    made = Action(action.kind, action.stage + step, action.micro)
    return (mail.kind, mail.to_stage, mail.micro) == made
