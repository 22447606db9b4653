"""Split parsing and ranges against the golden values of the reference."""

from __future__ import annotations

import pytest

from mtk.data.splits import parse_split, require_units, smallest_share, split_ranges
from mtk.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("text", "count", "sizes"),
    [
        ("969,30,1", 1000, [969, 30, 1]),
        ("969,30,1", 100, [97, 3, 0]),
        ("969,30,1", 8, [8, 0, 0]),
        ("949,50,1", 12345, [11715, 618, 12]),
        ("1,1,1", 100000, [33333, 33334, 33333]),
        ("1,1", 5, [2, 3]),  # round(2.5) = 2: half to even
        ("1,1", 7, [4, 3]),  # round(3.5) = 4
    ],
)
def test_golden_sizes(text: str, count: int, sizes: list[int]) -> None:
    ranges = split_ranges(text, count)
    assert [len(r) for r in ranges if r is not None] == sizes
    assert sum(sizes) == count


@pytest.mark.parametrize("text", ["969,30,1", "969/30/1", "969 30 1", "969.0, 30 ,1."])
def test_separators_do_not_matter(text: str) -> None:
    assert parse_split(text) == parse_split("969,30,1")


def test_shares_of_zero_are_no_split() -> None:
    assert parse_split("99,0,1")[1] is None
    assert parse_split("100") == ((0.0, 1.0), None, None)
    assert parse_split("0,0,5") == (None, None, (0.0, 1.0))


@pytest.mark.parametrize(
    "text", ["", "a,b", "1,2,3,4", "0,0,0", "1.2.3,4", ".", "nan,1,1", "-1,1,1", "1e2,1,1", "9;x,1"]
)
def test_bad_grammar(text: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.split"):
        parse_split(text)


@pytest.mark.parametrize("count", [8, 33, 100, 477, 1000])
@pytest.mark.parametrize("text", ["969,30,1", "949,50,1", "90,9.9,0.1", "1,998,1"])
def test_smallest_share_gives_one_sequence(text: str, count: int) -> None:
    for index, name in enumerate(("train", "valid", "test")):
        part = split_ranges(text, count)[index]
        assert part is not None
        if len(part):
            continue
        smallest = smallest_share(text, name, count)
        assert smallest is not None
        now = split_ranges(smallest.text, count)[index]
        assert now is not None
        assert len(now) == 1


def test_empty_split_names_numbers_and_knob() -> None:
    part = split_ranges("969,30,1", 100)[2]
    assert part is not None
    with pytest.raises(DataError) as caught:
        require_units(part, "test", "969,30,1", 100, "/data/a")
    message = str(caught.value)
    assert "the test split" in message
    assert "100 sequences" in message
    assert "--split " in message
    assert "/data/a" in message
    suggested = message.split("sequence: --split ")[1].split(", or")[0]
    assert [len(r or ()) for r in split_ranges(suggested, 100)] == [96, 3, 1]


def test_too_few_sequences_for_any_share() -> None:
    with pytest.raises(DataError, match="1 sequences are too few"):
        require_units(range(1, 1), "valid", "969,30,1", 1, "x")
