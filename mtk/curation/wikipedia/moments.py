"""Templates of dates."""

from __future__ import annotations

from mtk.curation.wikipedia.marks import GONE
from mtk.curation.wikipedia.names import words
from mtk.curation.wikipedia.templates import Call

_MONTHS = words(
    "January February March April May June July August September October November December"
)


def date_of(call: Call) -> str:
    """``{{start date|1879|3|14}}``; day first with ``df=y``."""
    first_day = call.get("df") in ("y", "yes", "1", "true")
    values = call.unnamed()
    # {{death date and age|died|...|born|...}} begins with the date it is named after.
    return written(values[:3], day_first=first_day) or call.get("1") or GONE


def start_date(call: Call) -> str:
    """``{{date|2009-12-31}}`` and ``{{dts|2009|12|31}}``."""
    values = call.unnamed()
    if len(values) == 1 and values[0].count("-") == 2:
        values = values[0].split("-")
    return written(values[:3], day_first=True) or call.get("1") or GONE


def as_of(call: Call) -> str:
    word = "since" if call.get("since") else "as of"
    if call.get("alt"):
        return call.get("alt")
    if not call.get("lc"):
        word = word.capitalize()
    moment = written(call.unnamed()[:3], day_first=call.get("df", "") not in ("us", "US", "mdy"))
    return f"{word} {moment}".rstrip()


def written(values: list[str], *, day_first: bool) -> str:
    """Year, month and day as a date in words; "" if the year is no number."""
    numbers = [value.lstrip("0") for value in values if value]
    if not numbers or not all(value.isascii() and value.isdigit() for value in numbers):
        return ""
    if len(numbers) == 1 or not 1 <= int(numbers[1]) <= 12:
        return numbers[0]
    month = _MONTHS[int(numbers[1]) - 1]
    if len(numbers) == 2:
        return f"{month} {numbers[0]}"
    if day_first:
        return f"{numbers[2]} {month} {numbers[0]}"
    return f"{month} {numbers[2]}, {numbers[0]}"
