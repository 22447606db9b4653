"""Schedules do all work once, in an order that cannot dead-lock, and no slower or larger
than the papers say."""

from __future__ import annotations

from collections import deque

import pytest

from mtk.parallel.schedules import Action, Message, Program, programs
from mtk.parallel.stages import placement

LAYOUTS = [
    ("1f1b", 1),
    ("interleaved", 2),
    ("interleaved", 3),
    ("zero-bubble", 1),
    ("zero-bubble", 2),
    ("zbv", 2),
]
COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 11, 16)


def make(
    schedule: str, virtual: int, ranks: int, count: int, *, training: bool = True
) -> list[Program]:
    where = placement(ranks, ranks * virtual, v_shape=schedule == "zbv")
    return programs(schedule, where, count, training=training)


def run_in_one_queue(everyone: list[Program]) -> None:
    """Run the programs where all messages of a rank go through one queue in the order they
    were posted, and a send waits for its receive. Raises AssertionError on a dead-lock."""
    at, queues = [0] * len(everyone), [deque[Message]() for _ in everyone]
    received = {
        Action(*s[1:4]) for p in everyone for s in p if isinstance(s, Message) and not s.sent
    }
    here: set[Action] = set()
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(everyone):
            while at[rank] < len(program):
                step = program[at[rank]]
                if isinstance(step, Message):
                    queues[rank].append(step)
                elif step in received and step not in here:
                    break
                at[rank] += 1
                moved = True
        for rank, queue in enumerate(queues):
            while queue and queue[0].sent:
                sent = queue[0]
                to = sent.stage + (1 if sent.kind == "forward" else -1)
                wanted = Message(False, sent.kind, to, sent.micro, rank)
                if not queues[sent.peer] or queues[sent.peer][0] != wanted:
                    break
                queues[sent.peer].popleft()
                queue.popleft()
                here.add(Action(sent.kind, to, sent.micro))
                moved = True
    assert at == [len(program) for program in everyone]
    assert not any(queues)


@pytest.mark.parametrize(("schedule", "virtual"), LAYOUTS)
def test_all_work_once_and_no_dead_lock(schedule: str, virtual: int) -> None:
    split = schedule in ("zero-bubble", "zbv")
    for ranks in range(1, 6):
        for count in COUNTS:
            for training in (True, False):
                everyone = make(schedule, virtual, ranks, count, training=training)
                done = [s for p in everyone for s in p if isinstance(s, Action)]
                kinds = (3 if split else 2) if training else 1
                assert len(set(done)) == len(done) == ranks * virtual * count * kinds
                run_in_one_queue(everyone)
                for program in everyone:
                    order = {step: n for n, step in enumerate(program)}
                    for step in program:
                        if isinstance(step, Action) and step.kind == "backward":
                            assert order[step._replace(kind="forward")] < order[step]
                        if isinstance(step, Action) and step.kind == "weight":
                            assert order[step._replace(kind="backward")] < order[step]


def test_a_wrong_order_of_messages_is_seen() -> None:
    everyone = make("interleaved", 2, 2, 4)
    sends = [n for n, s in enumerate(everyone[0]) if isinstance(s, Message) and s.sent]
    late = everyone[0].pop(sends[0])
    everyone[0].insert(sends[1], late)
    with pytest.raises(AssertionError):
        run_in_one_queue(everyone)


def held(program: Program, released_by: str) -> int:
    """Most (stage, micro-batch) pairs whose activations a rank holds at once."""
    now = most = 0
    for step in program:
        if isinstance(step, Action):
            now += (step.kind == "forward") - (step.kind == released_by)
            most = max(most, now)
    return most


def ticks(everyone: list[Program], *, split: bool) -> int:
    """The time of the slowest rank; forward and each half of backward take one tick."""
    clock, at = [0] * len(everyone), [0] * len(everyone)
    sent: dict[Action, int] = {}
    while any(n < len(p) for n, p in zip(at, everyone, strict=True)):
        for rank, program in enumerate(everyone):
            while at[rank] < len(program):
                step = program[at[rank]]
                if isinstance(step, Message):
                    if step.sent:
                        to = step.stage + (1 if step.kind == "forward" else -1)
                        sent[Action(step.kind, to, step.micro)] = clock[rank]
                else:
                    wants = Message(False, *step, 0)._replace(peer=-1)
                    posted = any(
                        isinstance(s, Message) and s._replace(peer=-1) == wants
                        for s in program[: at[rank]]
                    )
                    if posted and step not in sent:
                        break
                    start = max(clock[rank], sent[step] if posted else 0)
                    clock[rank] = start + (2 if step.kind == "backward" and not split else 1)
                at[rank] += 1
    return max(clock)


@pytest.mark.parametrize("count", [4, 8, 12])
def test_bubbles_and_memory_are_those_of_the_papers(count: int) -> None:
    ranks = 4
    # Bubble of 1F1B: (ranks - 1) forward and backward passes; / v when interleaved; a third
    # with backward split in memory-neutral form. One tick of a chunk is 1 / v of a stage's.
    for schedule, virtual, bubble, memory in (
        ("1f1b", 1, 3 * (ranks - 1), ranks),
        ("interleaved", 2, 3 * (ranks - 1), ranks + 2 * (ranks - 1) + 1),
        ("zero-bubble", 1, ranks - 1, ranks),
        ("zbv", 2, ranks, 2 * ranks),
    ):
        split = schedule in ("zero-bubble", "zbv")
        everyone = make(schedule, virtual, ranks, count)
        assert ticks(everyone, split=split) <= 3 * virtual * count + bubble, schedule
        most = max(held(p, "weight" if split else "backward") for p in everyone)
        assert most <= min(memory, virtual * count), schedule


def test_receive_buffers_do_not_grow_with_the_micro_batches() -> None:
    for schedule, virtual in LAYOUTS:
        for training in (True, False):
            for program in make(schedule, virtual, 4, 32, training=training):
                waiting = most = 0
                posted: set[Action] = set()
                for step in program:
                    if isinstance(step, Message):
                        waiting += not step.sent
                        posted |= set() if step.sent else {Action(*step[1:4])}
                    elif step in posted:
                        waiting -= 1
                    most = max(most, waiting)
                assert most <= 4


def test_a_placement_that_is_no_v_is_refused() -> None:
    with pytest.raises(ValueError, match="exactly two stages"):
        programs("zbv", (0, 1, 0, 1, 0, 1), 4)
