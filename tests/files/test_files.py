"""Bounded, typed JSON and whole files: what is refused, where the message points, what is set aside."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmix.errors import CheckpointError, QmixError, UsageError
from qmix.files import (
    LineFile,
    decode_json,
    read_bounded,
    read_json,
    read_state,
    read_text,
    write_whole,
    written_whole,
)


class Moe(msgspec.Struct):
    num_experts: int


class Params(msgspec.Struct):
    dim: int
    moe: Moe
    norm_eps: float = 1e-5


ZEROS = b"0" * 5000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"dim": 1, "moe": {"num_experts": "8"}}', "f: moe.num_experts: expected int, got str; fix it"),
        (b'{"dim": 1, "moe": []}', "f: moe: expected object, got array; fix it"),
        (b'{"dim": 1}', "f: object missing required field moe; fix it"),
        (b'{"dim": 1.5, "moe": {"num_experts": 8}}', "f: dim: expected int, got float; fix it"),
        (b'{"dim": true, "moe": {"num_experts": 8}}', "f: dim: expected int, got bool; fix it"),
        (b'{"dim": 1' + ZEROS + b"}", "f: dim: integer value out of range; fix it"),
        (b'{"dim": 1, "moe": {"num_experts": 8}, "norm_eps": 1e400}', "f: norm_eps: number out of range; fix it"),
        (b'{"dim": NaN}', "f: invalid JSON: invalid character (byte 8); fix it"),
        (b'{"dim": 1', "f: invalid JSON: Input data was truncated; fix it"),
        (b"", "f: invalid JSON: Input data was truncated; fix it"),
        (b'{"x": "\xff"}', "f: invalid JSON: not UTF-8 (byte 8); fix it"),
        (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "f: invalid JSON: nested too deeply; fix it"),
        (b"[]", "f: expected object, got array; fix it"),
    ],
)
def test_json_that_is_refused_says_where(text: bytes, message: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        decode_json(text, Params, "f", CheckpointError, "fix it")
    assert str(raised.value) == message


@pytest.mark.parametrize("text", [b'{"x": "\\ud800"}', b'{"x": "\\udc00 \\ud800"}'])
def test_lone_surrogates_are_refused(text: bytes) -> None:
    with pytest.raises(UsageError, match="f: invalid JSON"):
        decode_json(text, dict[str, Any], "f", UsageError)


def test_a_key_given_twice_is_refused_where_keys_are_to_be_unique() -> None:
    text = b'{"a": {"b": 1, "b": 2}}'
    assert decode_json(text, dict[str, Any], "f", UsageError) == {"a": {"b": 2}}
    with pytest.raises(UsageError, match="f: invalid JSON: the key 'b' is given twice"):
        decode_json(text, dict[str, Any], "f", UsageError, unique=True)


def test_a_byte_order_mark_and_whole_numbers_for_floats_are_taken() -> None:
    text = b'\xef\xbb\xbf{"dim": 2, "moe": {"num_experts": 8}, "norm_eps": 1}'
    assert decode_json(text, Params, "f", UsageError) == Params(2, Moe(8), 1.0)


@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for kind in (dict[str, Any], Params, list[int]):
        with suppress(UsageError):
            assert isinstance(decode_json(data, kind, "f", UsageError, unique=True), dict | list | Params)


@given(st.recursive(st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(), st.lists))
def test_what_python_writes_is_read_back(value: Any) -> None:
    assert decode_json(json.dumps({"v": value}).encode(), dict[str, Any], "f", UsageError) == {"v": value}


def test_an_endless_file_is_refused_by_its_size() -> None:
    with pytest.raises(UsageError, match="/dev/zero: larger than 1000 bytes; give a file"):
        read_bounded(Path("/dev/zero"), 1000, UsageError, "give a file")


@pytest.mark.parametrize(("name", "why"), [("none", "No such file"), (".", "Is a directory"), ("\0", "null byte")])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, why: str) -> None:
    with pytest.raises(CheckpointError, match=why):
        read_json(tmp_path / name, dict[str, Any], CheckpointError, "give another")


@pytest.mark.parametrize("content", [b"", b"{", b'{"dim": "x"}', b"\xff", b"[" * 100_000, b'{"dim": 1e999}'])
def test_an_unreadable_state_file_is_set_aside(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "machine.json"
    path.write_bytes(content)
    assert read_state(path, Moe) is None
    assert not path.exists()
    assert (tmp_path / "machine.json.unreadable").read_bytes() == content


def test_state_that_is_not_there_or_cannot_be_moved_stops_nothing(tmp_path: Path) -> None:
    assert read_state(tmp_path / "machine.json", Moe) is None
    assert read_state(tmp_path, Moe) is None
    assert issubclass(CheckpointError, QmixError)


KILLED = """
import os, sys
from pathlib import Path
from qmix import files

at, path = sys.argv[1], Path(sys.argv[2])
os.fsync = lambda *_: os.kill(os.getpid(), 9)
with files.written_whole(path) as file:
    file.write(b"half of what ")
    if at == "write":
        os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("at", ["write", "fsync"])
def test_what_a_killed_run_leaves_is_gone_after_the_next_write(tmp_path: Path, at: str) -> None:
    """Killed (SIGKILL) before the file has its name; the file is as it was, and the next write leaves nothing else."""
    path = tmp_path / "profile.json"
    write_whole(path, b"first")
    for _ in range(3):
        killed = subprocess.run([sys.executable, "-c", KILLED, at, str(path)], check=False)
        assert killed.returncode == -signal.SIGKILL
        assert path.read_bytes() == b"first"
        assert len(list(tmp_path.iterdir())) == 2  # however many were killed
    write_whole(path, b"second")
    assert path.read_bytes() == b"second"
    assert [each.name for each in tmp_path.iterdir()] == ["profile.json"]


def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    write_whole(path, b"first")
    with suppress(KeyboardInterrupt), written_whole(path) as file:
        file.write(b"second")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"first"
    assert [each.name for each in tmp_path.iterdir()] == ["s.json"]


def test_writers_of_one_file_at_once_each_write_it_whole(tmp_path: Path) -> None:
    path, seen = tmp_path / "s", set()
    contents = [bytes([letter]) * 50_000 for letter in b"abcdefgh"]
    write_whole(path, contents[0])

    def write(content: bytes) -> None:
        for _ in range(5):
            write_whole(path, content)

    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        seen.add(path.read_bytes())
    assert seen <= set(contents)
    assert [each.name for each in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("name", ["/dev/full", "/dev/null", "/dev/zero", "directory", "fifo"])
def test_only_a_regular_file_takes_lines(tmp_path: Path, name: str) -> None:
    """The others would be read without end, wait for somebody, or keep nothing."""
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    path = tmp_path / name
    with pytest.raises(UsageError) as raised:
        LineFile(path, "choose another")
    assert str(raised.value) == f"{path}: not a regular file; choose another"


def test_lines_are_bounded_where_they_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"one\n" + b"x" * 50 + b"\nthree\ncut")
    with LineFile(path, "") as file:
        assert list(file.lines(10)) == [b"one\n", b"x" * 11]
        assert path.stat().st_size == 64  # nothing was dropped
        assert list(file.lines(51)) == [b"one\n", b"x" * 50 + b"\n", b"three\n"]
    assert path.read_bytes() == b"one\n" + b"x" * 50 + b"\nthree\n"


def test_text_is_bounded_and_utf8_whatever_ends_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert read_text(path) == "one\ntwo\nthree\n"
    path.write_bytes(b"\xff")
    with pytest.raises(UsageError, match=re.escape("--text: not UTF-8 text (byte 0); save it as UTF-8")):
        read_text(path, "--text")
    with pytest.raises(UsageError, match=r"^/dev/zero: larger than 4194304 bytes; give a text file of at most 4 MiB$"):
        read_text(Path("/dev/zero"))


def test_half_of_a_surrogate_pair_is_called_so() -> None:
    with pytest.raises(UsageError, match="f: invalid JSON: an unpaired surrogate"):
        decode_json(b'{"x": "\\ud800"}', dict[str, Any], "f", UsageError)
