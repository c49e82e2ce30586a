"""Inputs for parsers: documents that are valid, changed in one to four places, and values that hypothesis thinks of.

An input follows from the seed, the parser's name and its number alone, so that any of them can be made again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

DEEP = (50, 1_100, 20_000)
LONG = 20_000
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 7, 63, 64, 65, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**40, -(10**40),
    0.0, -0.0, 0.5, 1.0, 1e-320, 1e308, float("nan"), float("inf"), float("-inf"),
    "", " ", "0", "1", "nf4", "half", "gpu:0", "../x", "/dev/zero", "\0", "\n", "\r", "\x1b[2J", "\ud800",
    "\udc00\ud800", "é" * 300, "😀", "a" * LONG, "{{ 1/0 }}", "%s%n", "١٢", "NaN", [], {}, [[]], {"": None}, [None],
    [0] * LONG,
)  # fmt: skip
RAW_VALUES = (b"1e999", b"-1e999", b"1" + b"0" * 400, b"1" + b"0" * 5000, b"0x10", b"01", b"1.", b"'a'", b"tru", b"")
PIECES = (
    b"\0", b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\n", b"\r\n", b"{", b"}", b"[", b"]", b'"', b"\\",
    b"\\ud800", b",", b":", b"-", b"9" * 30, b"e9", b"*", b"=", b".", b"/", b"@", b"..", b"--", b" ", b"GiB", b"%",
    b"\xe2\x80\xae", b"\xd9\xa1", b"'", b"#", b"&a *a", b"!!python/object:os.system", b"{% for i in range(9**9) %}",
    b"{{",
)  # fmt: skip

JSON = (
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
        max_leaves=8,
    )
    .map(json.dumps)
    .map(str.encode)
)
ANYTHING = st.binary(max_size=200) | st.text(max_size=60).map(str.encode) | JSON


def thought_of(count: int, number: int) -> list[bytes]:
    """Return `count` inputs of hypothesis' own, the same for the same `number`."""
    found: list[bytes] = []

    @seed(number)
    @settings(
        max_examples=max(1, count),
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(ANYTHING)
    def collect(value: bytes) -> None:
        found.append(value)

    if count:
        collect()
    return found[:count]


def mutated(rng: random.Random, documents: Sequence[bytes], form: str) -> bytes:
    """Return one of the documents, changed as its form ("json", "lines", "safetensors" or "text") suggests."""
    data = rng.choice(documents)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        change = rng.choice(CHANGES[form])
        try:
            data = change(rng, data)
        except (RecursionError, ValueError, OverflowError):  # too deep or too large to be changed as JSON
            data = bit_flipped(rng, data)
    return data


# bytes


def bit_flipped(rng: random.Random, data: bytes) -> bytes:
    if not data:
        return b"\x01"
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]


def cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def inserted(rng: random.Random, data: bytes) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.choice(PIECES) + data[place:]


def removed(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.randrange(1, 9) :]


def repeated(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    part = data[start : start + rng.randrange(1, 200)]
    return data[:start] + part * rng.choice((2, 3, 50)) + data[start + len(part) :]


def otherwise_encoded(rng: random.Random, data: bytes) -> bytes:
    text = data.decode("utf-8", errors="replace")
    return text.encode(rng.choice(("utf-16", "utf-32", "latin-1", "utf-8-sig")), errors="replace")


# JSON


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values inside, a few of each long list."""
    found = [path]
    inside: Any = ()
    if isinstance(value, dict):
        inside = list(value.items())
    elif isinstance(value, list):
        inside = list(enumerate(value))
    for key, each in inside[:12] + inside[-2:] if len(inside) > 14 else inside:
        found += _places(each, (*path, key))
    return found


def _put(value: Any, path: Sequence[Any], new: Callable[[Any], Any]) -> Any:
    """Return a copy with `new` of what was at a path in its place."""
    if not path:
        return new(value)
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = _put(copy[path[0]], path[1:], new)
    return copy


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _dumped(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=True).encode()


def other_value(rng: random.Random, data: bytes) -> bytes:
    value = _parsed(data)
    path = rng.choice(_places(value))
    return _dumped(_put(value, path, lambda old: rng.choice(VALUES)))


def near_value(rng: random.Random, data: bytes) -> bytes:
    """A number, text or list that is nearly what it was."""
    value = _parsed(data)

    def near(old: Any) -> Any:
        if isinstance(old, bool) or old is None:
            return rng.choice((0, 1, "true", [old]))
        if isinstance(old, int):
            return rng.choice((old + 1, old - 1, -old, old * 2, old // 2, float(old), str(old), [old], old * 10**18))
        if isinstance(old, float):
            return rng.choice((-old, old * 10, old / 1e9, str(old), [old], int(old)))
        if isinstance(old, str):
            return rng.choice((old + "x", old[:-1], old.upper(), [old], {"a": old}, old * 3, old + "\n"))
        if isinstance(old, list):
            return rng.choice((old + old[:1], old[:-1], old[::-1], [old], [*old, None], dict(enumerate(map(str, old)))))
        return rng.choice(([old], list(old), {**old, "extra": old}))

    return _dumped(_put(value, rng.choice(_places(value)), near))


def key_changed(rng: random.Random, data: bytes) -> bytes:
    """A key that is gone, new, of another name, or with the value of another."""
    value = _parsed(data)
    paths = [path for path in _places(value) if path and isinstance(path[-1], str)]
    if not paths:
        return other_value(rng, data)
    *outer, key = rng.choice(paths)

    def change(old: dict[str, Any]) -> dict[str, Any]:
        rest = {name: each for name, each in old.items() if name != key}
        other = rng.choice(list(old))
        return rng.choice((rest, rest | {key + "x": old[key]}, old | {key: old[other]}, old | {"": old[key]}))

    return _dumped(_put(value, outer, change))


def key_given_twice(rng: random.Random, data: bytes) -> bytes:
    value = _parsed(data)
    keys = [path[-1] for path in _places(value) if path and isinstance(path[-1], str)]
    text = _dumped(value)
    if not keys:
        return text
    quoted = _dumped(rng.choice(keys)) + b":"
    return text.replace(quoted, quoted + b" " + _dumped(rng.choice(VALUES[:40])) + b", " + quoted, 1)


def raw_value(rng: random.Random, data: bytes) -> bytes:
    """A value that Python's json does not write."""
    value = _parsed(data)
    marked = _dumped(_put(value, rng.choice(_places(value)), lambda old: "MARK-0"))
    return marked.replace(b'"MARK-0"', rng.choice(RAW_VALUES), 1)


def nested(rng: random.Random, data: bytes) -> bytes:
    value, depth = _parsed(data), rng.choice(DEEP)
    marked = _dumped(_put(value, rng.choice(_places(value)), lambda old: "MARK-0"))
    before, after = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
    return marked.replace(b'"MARK-0"', before * depth + b"0" + after * depth, 1)


# lines, safetensors


def a_line(rng: random.Random, data: bytes) -> bytes:
    """One line changed as JSON, moved, or given again."""
    lines = data.split(b"\n")
    place = rng.randrange(len(lines))
    line = lines[place]
    if not line or rng.random() < 0.2:
        other = rng.choice(lines)
        return b"\n".join(rng.choice(([*lines[:place], *lines[place + 1 :]], [*lines, other], lines[::-1])))
    lines[place] = rng.choice(CHANGES["json"])(rng, line)
    return b"\n".join(lines)


def a_header(rng: random.Random, data: bytes) -> bytes:
    """A header changed as JSON, with a length that fits it, or nearly."""
    length = int.from_bytes(data[:8], "little")
    if not 0 < length <= len(data) - 8:
        return bit_flipped(rng, data)
    header = rng.choice(CHANGES["json"])(rng, data[8 : 8 + length])
    said = len(header) + rng.choice((0, 0, 0, 0, 1, -1, 2**40))
    return max(said, 0).to_bytes(8, "little") + header + data[8 + length :]


BYTES = (bit_flipped, cut, inserted, removed, repeated, otherwise_encoded)
JSON_CHANGES = (other_value, other_value, near_value, near_value, key_changed, key_given_twice, raw_value, nested)
CHANGES: dict[str, tuple[Callable[[random.Random, bytes], bytes], ...]] = {
    "text": BYTES,
    "json": (*JSON_CHANGES, *BYTES),
    "lines": (a_line, a_line, a_line, a_line, *BYTES),
    "safetensors": (a_header, a_header, a_header, *BYTES),
}
