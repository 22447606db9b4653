"""Templates of numbers: measures, fractions, values with an error, grouped digits."""

from __future__ import annotations

from mtk.curation.wikipedia.marks import GONE
from mtk.curation.wikipedia.templates import Call

_BETWEEN = {
    "-": "–",
    "–": "–",
    "to": " to ",
    "to(-)": " to ",
    "and": " and ",
    "and(-)": " and ",
    "or": " or ",
    "x": " × ",
    "×": " × ",
    "*": " × ",
    "by": " by ",
    "by(x)": " by ",
    "+/-": " ± ",
    "±": " ± ",
    "+": " + ",
    ",": ", ",
    "/": "/",
}
_UNITS = {
    "c": "°C",
    "f": "°F",
    "k": "K",
    "sqmi": "sq mi",
    "sqft": "sq ft",
    "sqin": "sq in",
    "sqyd": "sq yd",
    "sqkm": "km²",
    "sqm": "m²",
    "km2": "km²",
    "m2": "m²",
    "cm2": "cm²",
    "mm2": "mm²",
    "m3": "m³",
    "km3": "km³",
    "cm3": "cm³",
    "cuft": "cu ft",
    "cuin": "cu in",
    "cuyd": "cu yd",
    "cumi": "cu mi",
    "mph": "mph",
    "kn": "knots",
    "impgal": "imp gal",
    "usgal": "US gal",
    "u.s.gal": "US gal",
    "usoz": "US oz",
    "impoz": "imp oz",
    "ozt": "oz t",
    "lt": "long tons",
    "st": "short tons",
    "long ton": "long tons",
    "short ton": "short tons",
    "acre": "acres",
    "foot": "ft",
    "feet": "ft",
    "inch": "in",
    "mile": "mi",
    "miles": "mi",
    "yard": "yd",
    "km/h": "km/h",
    "/sqkm": "/km²",
    "/sqmi": "/sq mi",
    "pd/sqkm": "/km²",
    "pd/sqmi": "/sq mi",
    "/km2": "/km²",
    "/mi2": "/sq mi",
    "mi2": "sq mi",
    "ft2": "sq ft",
    "in2": "sq in",
    "ft3": "cu ft",
    "kph": "km/h",
    "lbf.ft": "lb⋅ft",
    "nm": "nm",
    "nmi": "nmi",
}


def convert(call: Call) -> str:
    """``{{convert|5|to|10|km|mi}}``: the first measure as it was written, not the computed one."""
    values = call.unnamed()
    if len(values) < 2:
        return call.get("1") or GONE
    shown, position = grouped(values[0]), 1
    while position + 1 < len(values) and values[position].lower() in _BETWEEN:
        shown += _BETWEEN[values[position].lower()] + grouped(values[position + 1])
        position += 2
    unit = values[position] if position < len(values) else ""
    # Two units of one measure: {{convert|5|ft|10|in|cm}}.
    if len(values) > position + 2 and values[position + 1].replace(".", "", 1).isdigit():
        return f"{shown} {_unit(unit)} {values[position + 1]} {_unit(values[position + 2])}"
    name = _unit(unit)
    if call.get("adj") in ("on", "mid", "pre"):
        return f"{shown}-{name}"
    return f"{shown}{name}" if name.startswith("/") else f"{shown} {name}".rstrip()


def _unit(unit: str) -> str:
    return _UNITS.get(unit.lower(), unit)


def fraction(call: Call) -> str:
    values = call.unnamed()
    if not values:
        return "⁄"
    if len(values) == 1:
        return f"1/{values[0]}"
    if len(values) == 2:
        return f"{values[0]}/{values[1]}"
    return f"{values[0]} {values[1]}/{values[2]}"


def grouped_number(call: Call) -> str:
    return grouped(call.get("1"))


def grouped(number: str) -> str:
    """Digits in groups of three; what is no number stays as it is."""
    whole, point, rest = number.partition(".")
    sign = whole[:1] if whole[:1] in ("-", "−", "+") else ""
    digits = whole[len(sign) :]
    if not digits.isascii() or not digits.isdigit() or len(digits) < 4:
        return number
    return f"{sign}{int(digits):,}{point}{rest}"


def value_with_error(call: Call) -> str:
    """``{{val|1.23|0.05|e=6|u=km}}``: 1.23±0.05×10^6 km."""
    number, error = grouped_number(call), call.get("2")
    shown = number + (f"±{error}" if error and "(" not in error else error)
    if call.get("e"):
        shown += f"×10^{call.get('e')}"
    unit = call.get("u", "ul")
    over = call.get("up", "upl")
    shown += f" {unit}" if unit else ""
    shown += f"/{over}" if over else ""
    return call.get("p", "pl") + shown + call.get("s", "end")
