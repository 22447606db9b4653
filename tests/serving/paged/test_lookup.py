"""Guesses are what followed the same tokens before, and known by how often they were right."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from serving.paged.lookup import MOST_PLACES, DraftSettings, Lookup


def made(text: str, **values: int) -> tuple[Lookup, list[int]]:
    ids = list(text.encode())
    lookup = Lookup(ids, DraftSettings(**values))
    lookup.advance()
    return lookup, ids


def append(lookup: Lookup, ids: list[int], text: str) -> None:
    """Token by token, as they come."""
    for token in text.encode():
        ids.append(token)
        lookup.advance()


def simplest_place(ids: Sequence[int], shortest: int, longest: int) -> int | None:
    """Where the longest end in common lies, among the latest places; by trying all."""
    places = [
        end
        for end in range(len(ids) - 1, shortest - 1, -1)
        if ids[end - shortest : end] == ids[len(ids) - shortest :]
    ][:MOST_PLACES]
    if len(ids) < shortest or not places:
        return None

    def common(end: int) -> int:
        size = shortest
        while size < min(longest, end) and ids[end - size - 1] == ids[-size - 1]:
            size += 1
        return size

    return max(places, key=lambda end: (common(end), end))


@pytest.mark.parametrize("seed", range(30))
def test_the_place_is_that_of_the_longest_end_in_common(seed: int) -> None:
    chance = random.Random(seed)
    shortest = chance.randrange(1, 4)
    longest = shortest + chance.randrange(4)
    ids = chance.choices(range(chance.randrange(1, 7)), k=chance.randrange(1, 40))
    lookup = Lookup(ids, DraftSettings(shortest=shortest, longest=longest))
    lookup.advance()
    assert lookup._source == simplest_place(ids, shortest, longest)
    for _ in range(60):
        ids.append(chance.randrange(5))
        before = lookup._source
        lookup.advance()
        kept = before is not None and ids[before] == ids[-1]
        expected = before + 1 if kept else simplest_place(ids, shortest, longest)  # type: ignore[operator]
        assert lookup._source == expected


def test_chains_do_not_depend_on_when_tokens_were_looked_at() -> None:
    chance = random.Random(1)
    ids = chance.choices(range(4), k=300)
    for shortest in (1, 2, 3):
        at_once = Lookup(ids, DraftSettings(shortest=shortest))
        at_once.advance()
        grown: list[int] = ids[:1]
        by_parts = Lookup(grown, DraftSettings(shortest=shortest))
        by_parts.advance()
        while len(grown) < len(ids):
            grown += ids[len(grown) : len(grown) + chance.randrange(1, 9)]
            by_parts.advance()
        assert at_once._before == by_parts._before and at_once._last == by_parts._last


def test_tokens_seen_late_count_as_those_seen_one_by_one() -> None:
    chance = random.Random(2)
    for _ in range(20):
        ids = chance.choices(range(3), k=80)
        one, late = list(ids[:10]), list(ids[:10])
        lookups = [Lookup(text, DraftSettings()) for text in (one, late)]
        for lookup in lookups:
            lookup.advance()
        for token in ids[10:]:
            one.append(token)
            lookups[0].advance()
        late += ids[10:]
        lookups[1].advance()
        assert lookups[0].expected == lookups[1].expected
        assert lookups[0]._source == lookups[1]._source


def test_a_guess_goes_on_like_the_place_it_was_found_at() -> None:
    lookup, ids = made("the quick brown fox; the ", most=8)
    assert lookup.matched and lookup.length == 1 and lookup.draft(1) == [ord("q")]
    append(lookup, ids, "qu")
    # Right twice, after nothing: as much again may be expected.
    assert 1.5 < lookup.expected < 2 and lookup.length == 4 and bytes(lookup.draft(4)) == b"ick "
    append(lookup, ids, "ick brow")
    assert lookup.length == 8 and bytes(lookup.draft(8)) == b"n fox; t"


def test_a_guess_runs_into_itself() -> None:
    lookup, ids = made("abcabc", most=9)
    append(lookup, ids, "abcabcabc")
    assert bytes(lookup.draft(9)) == b"abcabcabc"
    lookup, ids = made("aaa", most=5)
    append(lookup, ids, "aaaaa")
    assert lookup.draft(5) == [ord("a")] * 5


def test_what_is_expected_follows_what_was_right() -> None:
    lookup, ids = made("12345 12345 1", most=4)
    assert lookup.matched and lookup.expected == 0
    append(lookup, ids, "2345 12345 12345" + " 12345" * 10)
    assert 3.9 < lookup.expected <= 4
    random.seed(3)
    # Every pair again, with another token behind it each time.
    for third in range(150, 190):
        append(lookup, ids, "xy")
        ids.append(third)
        lookup.advance()
    assert lookup.expected < 0.3 and lookup.length == 1


def test_nothing_is_guessed_of_a_text_without_repetition() -> None:
    ids = list(range(100))
    lookup = Lookup(ids, DraftSettings())
    lookup.advance()
    for token in range(100, 200):
        ids.append(token)
        lookup.advance()
        assert not lookup.matched and lookup.draft(7) == []
