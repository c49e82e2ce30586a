"""Byte counts as people write them: GB = 1e9, GiB = 2**30."""

from __future__ import annotations

import re

from qmix.errors import UsageError

_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str | int) -> int:
    """'12GiB', '500 MB', '1.5g' or a plain number to bytes. Raises UsageError."""
    if type(text) is int:
        value = text
    elif not isinstance(text, str):
        raise UsageError(f"{text!r} is not a size; give whole bytes, or a text like '12GiB'")
    else:
        match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([kmgt]i?)?b?\s*", text, re.IGNORECASE)
        if match is None:
            raise UsageError(f"{text!r} is not a size; write it like 12GiB, 500MB or 20000000000")
        value = round(float(match[1]) * (_FACTORS | _BINARY)[(match[2] or "").lower()])
    if value <= 0:
        raise UsageError(f"{text!r} is not a size above zero")
    return value


def format_bytes(count: float) -> str:
    """Three digits and a decimal unit: 71.9 GB, 512 kB, 80 B."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= factor:
            scaled = count / factor
            return f"{scaled:.0f} {unit}" if abs(scaled) >= 999.5 else f"{scaled:.3g} {unit}"
    return f"{count:.0f} B"
