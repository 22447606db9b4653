"""Who holds which block: counting, finding beginnings, forgetting the longest unused."""

from __future__ import annotations

import random

import pytest

from serving.paged.blocks import BlockPool, Table

TEXT = list(range(100, 120))


def table(pool: BlockPool, ids: list[int]) -> tuple[Table, int]:
    made = Table(pool)
    found = made.find(ids)
    made.extend(len(ids))
    made.publish(ids, len(ids))
    return made, found


def test_blocks_are_taken_and_given_back() -> None:
    pool = BlockPool(4, 4)
    held = [pool.take() for _ in range(4)]
    assert sorted(held) == [1, 2, 3, 4] and pool.available == 0 and pool.used == 4
    with pytest.raises(IndexError, match="held"):
        pool.take()
    pool.give_back(held[2])
    assert pool.take() == held[2]
    for block in held:
        pool.give_back(block)
    with pytest.raises(ValueError, match="nobody"):
        pool.give_back(held[0])
    assert pool.available == 4


def test_a_beginning_is_shared_while_it_is_held_and_afterwards() -> None:
    pool = BlockPool(20, 4)
    first, found = table(pool, TEXT)
    assert found == 0
    second, found = table(pool, [*TEXT[:11], 7])
    assert found == 8 and second.blocks[:2] == first.blocks[:2]
    assert not set(second.blocks[2:]) & set(first.blocks)
    first.release()
    assert pool.used == 3
    second.release()
    assert pool.used == 0
    # The last token is left over: it must be computed for its logits.
    third, found = table(pool, TEXT)
    assert found == 16 and len(third.blocks) == 5


def test_the_whole_text_before_a_block_decides() -> None:
    """Equal blocks behind different beginnings are different blocks."""
    pool = BlockPool(20, 4)
    table(pool, [1, 2, 3, 4, 9, 9, 9, 9, 5])
    _, found = table(pool, [4, 3, 2, 1, 9, 9, 9, 9, 5])
    assert found == 0


def test_the_longest_unused_is_forgotten_first() -> None:
    pool = BlockPool(4, 4)
    old, new = [1] * 4, [2] * 4
    for ids in (old, new):
        table(pool, [*ids, 0])[0].release()
    assert table(pool, [*old, 0])[1] == 4  # now held, so that ``new`` is what may go
    for _ in range(2):
        pool.take()
    assert pool.available == 0
    assert Table(pool).find([*new, 0]) == 0


def test_without_memory_nothing_is_found() -> None:
    pool = BlockPool(9, 4, remember=False)
    table(pool, TEXT)
    assert Table(pool).find(TEXT) == 0 and pool.remembered == 0


def test_what_is_broken_is_not_found_again() -> None:
    pool = BlockPool(9, 4)
    made, _ = table(pool, TEXT)
    made.release(forget=True)
    assert Table(pool).find(TEXT) == 0
    assert pool.available == 9 and pool.remembered == 0


def test_counts_hold_under_any_use() -> None:
    """A thousand random sequences over few texts: nothing leaks, and no block that is held has
    two contents."""
    random.seed(3)
    pool, held = BlockPool(30, 4), []
    for _ in range(1000):
        if held and random.random() < 0.5:
            held.pop(random.randrange(len(held)))[0].release(forget=random.random() < 0.1)
        length = random.randrange(1, 24)
        ids = [random.randrange(2) for _ in range(length)]
        made = Table(pool)
        made.find(ids)
        if made.missing(length) > pool.available:
            made.release()
            continue
        made.extend(length)
        made.publish(ids, length)
        held.append((made, ids))
        contents: dict[int, set[tuple[int, ...]]] = {}
        for other, text in held:
            for i, block in enumerate(other.blocks):
                full = (i + 1) * 4 <= len(text)
                contents.setdefault(block, set()).add(tuple(text[: (i + 1) * 4]) if full else (-1,))
        assert all(len(found) == 1 for found in contents.values())
        assert pool.used == len(contents)
    for made, _ in held:
        made.release()
    assert pool.available == 30
