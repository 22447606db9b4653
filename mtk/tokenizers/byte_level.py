"""GPT-2's reversible spelling of bytes as printable characters (Radford et al. 2019)."""

from __future__ import annotations

from functools import cache


@cache
def byte_of_character() -> dict[str, int]:
    """Printable Latin-1 bytes stand for themselves, the other 68 for U+0100 upwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if chr(byte) not in table)
    table.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return table


def piece_bytes(piece: str) -> bytes | None:
    """The bytes a byte-level piece stands for; None if it is not spelled that way."""
    table = byte_of_character()
    try:
        return bytes([table[character] for character in piece])
    except KeyError:
        return None
