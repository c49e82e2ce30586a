"""Byte counts and rates as people write them: GB = 1e9, GiB = 2**30.

All messages of a process are in one unit system. The command line sets it to the one that its user typed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from qmix.errors import UsageError

_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
DECIMAL_STEPS = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}
BINARY_STEPS = {"TiB": 2.0**40, "GiB": 2.0**30, "MiB": 2.0**20, "KiB": 2.0**10}
LEAST_MEANT = 10**5  # bytes, bytes/s or FLOP/s; the unit of a smaller number was forgotten
LONGEST = 40  # characters of typed text in a message
MOST = 2**62  # bytes: more than any machine addresses, and an int64 holds it


def parse_bytes(text: str | int) -> int:
    """Return the bytes of '12GiB', '500 MB', '1.5g' or a plain number. Raises UsageError."""
    if type(text) is int:
        value = text
    elif not isinstance(text, str):
        raise UsageError(f"{quoted(text)} is not a size; give whole bytes, or a text like '12GiB'")
    else:
        match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([kmgt]i?)?b?\s*", text, re.IGNORECASE)
        if match is None:
            raise UsageError(f"{quoted(text)} is not a size; write it like 12GiB, 500MB or 20000000000")
        value = round(float(match[1]) * (_FACTORS | _BINARY)[(match[2] or "").lower()])
    if not 0 < value <= MOST:
        raise UsageError(f"{quoted(text)} is not a size above zero and below 4 EiB")
    bare = str(text).strip()
    if value < LEAST_MEANT and bare[-1].isdecimal():
        meant = f"{bare}{'GiB' if value < 4096 else 'MiB'}"
        raise UsageError(f"{quoted(text)} is not a size: too few bytes; did you mean {meant}?")
    return value


def quoted(text: object) -> str:
    """Return typed text as a message quotes it, cut where it is long."""
    shown = repr(text)
    return shown if len(shown) <= LONGEST + 2 else f"{shown[:LONGEST]}…"


class UnitSystem:
    """The unit system of messages: decimal (GB) unless `binary` (GiB) is set."""

    binary = False


def is_binary(text: str) -> bool | None:
    """Return True for a typed size such as 12GiB, False for 12GB, None where it has no unit."""
    unit = re.search(r"([kmgt])(i?)b?\s*(?:/\s*s\s*)?$", text, re.IGNORECASE)
    return None if unit is None else bool(unit[2])


def format_bytes(count: float) -> str:
    """Return a byte count with three digits and its unit: 71.9 GB, 512 kB, 80 B; in the binary system 67 GiB."""
    return _scaled(count, BINARY_STEPS if UnitSystem.binary else DECIMAL_STEPS) or f"{count:.0f} B"


def _scaled(count: float, steps: Mapping[str, float]) -> str:
    """Return a number with three digits and the largest unit that it reaches; empty where it reaches none."""
    for unit, factor in steps.items():
        if abs(count) >= factor:
            scaled = count / factor
            return f"{scaled:.0f} {unit}" if abs(scaled) >= 999.5 else f"{scaled:.3g} {unit}"
    return ""


def size_option(count: float, up: bool = True) -> str:
    """Return bytes as an option takes them, in whole MB or MiB: not less than `count`, or not more if not `up`."""
    unit, factor = ("MiB", 2**20) if UnitSystem.binary else ("MB", 10**6)
    return f"{math.ceil(count / factor) if up else int(count // factor)}{unit}"


def plural(count: int, noun: str, many: str = "") -> str:
    """Return "1 turn" or "2 turns"; `many` is the plural of a noun that takes no s."""
    return f"{count} {noun if count == 1 else many or noun + 's'}"


def parse_rate(text: str) -> float:
    """Return the bytes/s of '25GB/s', '3.2 GB' or '900G'. Raises UsageError."""
    bare = re.sub(r"\s*/\s*s\s*$", "", text).strip()
    try:
        return float(parse_bytes(bare))
    except UsageError as error:
        meant = f"did you mean {bare}GB/s?" if "did you mean" in str(error) else "write it like 25GB/s"
        raise UsageError(f"{quoted(text)} is not a rate; {meant}") from None


def parse_flops(text: str) -> float:
    """Return the FLOP/s of '80TFLOP/s', '800 GFLOPS' or '80T'. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([kmgt]?)(?:flops?(?:\s*/\s*s)?)?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise UsageError(f"{quoted(text)} is not a compute rate; write it like 80TFLOP/s")
    rate = float(match[1]) * _FACTORS[match[2].lower()]
    if rate < LEAST_MEANT and not match[2]:
        raise UsageError(f"{quoted(text)} is not a compute rate; did you mean {match[1]}TFLOP/s?")
    return rate


def format_flops(rate: float) -> str:
    """Return a rate such as 1.04 TFLOP/s."""
    return f"{_scaled(rate, DECIMAL_STEPS)[:-1] or f'{rate:.0f} '}FLOP/s"
