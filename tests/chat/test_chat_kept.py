"""A chat outlives what ends its process, and nothing that is typed, loaded or fails within a turn ends it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from command import COMMAND, LIMIT_SECONDS
from stores import make_store
from test_chat_session import ASK, CHAT, MORE, typed
from test_chat_terminal import GREEDY, Typist, turns_of

from qmix.chat.kept import MOST, KeptChat, interrupted
from qmix.chat.loop import Chat, Screen
from qmix.chat.session import Session
from qmix.engine.stream import Runner
from qmix.errors import StoreError
from qmix.plan import make_plan

TOLD = re.compile(r"a chat was interrupted; to continue it: /load (\S+)")


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGHUP, signal.SIGTERM])
def test_a_chat_whose_process_ends_is_there_at_the_next_start(qmix, isolated_home, end):
    pipe = subprocess.PIPE
    with subprocess.Popen([*COMMAND, *CHAT], stdin=pipe, stdout=pipe, stderr=pipe) as process:
        process.stdin.write(typed(ASK))
        process.stdin.flush()
        assert b"prompt tokens in" in process.stderr.readline()
        answer = process.stdout.readline().decode()
        process.send_signal(end)
        assert process.wait(LIMIT_SECONDS) == -end
    (path,) = isolated_home.rglob("chats/*")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    again = qmix(*CHAT, "-q", stdin=typed(ASK))
    kept = TOLD.fullmatch(again.lines[0])[1]
    done = qmix(*CHAT, stdin=typed(f"/load {kept}", MORE))
    assert done.lines[0] == f"loaded 1 turn from {kept}", "and it is told of once"
    whole = qmix(*CHAT, stdin=typed(ASK, MORE))
    assert whole.out == answer + done.out


def test_a_chat_whose_terminal_is_closed_is_there_at_the_next_start(qmix):
    first = Typist(qmix, *GREEDY)
    first.enter(ASK)
    first.terminal.close()
    second = Typist(qmix, *GREEDY)
    try:
        kept = TOLD.search(second.greeting)[1]
        assert [user for user, _ in turns_of(Path(kept))] == [ASK]
        assert second.enter(f"/load {kept}").startswith(f"loaded 1 turn from {kept}")
    finally:
        second.terminal.close()


def test_chats_that_ended_by_themselves_are_kept_in_a_bounded_number_and_not_told_of(qmix, isolated_home):
    directory = isolated_home / "state" / "qmix" / "chats"
    directory.mkdir(parents=True)
    for number in range(MOST + 5):
        (directory / f"20200101-0000{number:02}-1.json").write_text("{}")
    state = {"XDG_STATE_HOME": str(isolated_home / "state")}
    assert qmix(*CHAT, "-q", stdin=typed(ASK), **state).err == ""
    assert len(list(directory.iterdir())) == MOST
    assert qmix(*CHAT, "-q", "--no-history", stdin=typed(ASK), **state).err == ""
    assert len(list(directory.glob("2020*"))) == MOST - 1


def test_a_chat_that_cannot_be_kept_says_so_once_and_goes_on(qmix, tmp_path):
    (tmp_path / "file").touch()
    done = qmix(*CHAT, "-q", stdin=typed(ASK, MORE), XDG_STATE_HOME=str(tmp_path / "file"))
    assert (done.status, len(done.lines), done.out.count("\n")) == (0, 1, 2)
    assert done.lines[0].startswith("this chat is not saved automatically: ")


DEEP = '{"schema": "qmix-chat-1", "turns": ' + "[" * 100_000 + "]" * 100_000 + "}"
TURN = '{{"user": "a", "answer": "b", "kept": {}, "opening": [1], "answer_ids": [2]}}'
WHOLE = (
    '{{"schema": "qmix-chat-1", "model": {{"name": "a", "parts": {{}}}}, "system": "", '
    '"settings": {}, "forgotten": {}, "turns": {}}}'
)
ODD = {
    "nested deeply": DEEP,
    "a list": "[1]",
    "text": '"qmix-chat-1"',
    "an object for turns": WHOLE.format("{}", 0, "{}"),
    "a list for a turn": WHOLE.format("{}", 0, "[[]]"),
    "a list for settings": WHOLE.format("[]", 0, "[]"),
    "a number of 5000 digits": WHOLE.format("{}", "9" * 5000, "[]"),
    "a setting of 5000 digits": WHOLE.format('{"seed": ' + "9" * 5000 + "}", 0, "[]"),
    "an id of 5000 digits": WHOLE.format("{}", 0, f"[{TURN.format('9' * 5000)}]"),
    "a negative id": WHOLE.format("{}", 0, f"[{TURN.format(-1)}]"),
    "a setting that is none": WHOLE.format('{"heat": 1}', 0, "[]"),
    "a list for a setting": WHOLE.format('{"temperature": [1]}', 0, "[]"),
    "a key twice": WHOLE.format("{}", 0, "[]").replace('"system"', '"turns": [], "system"'),
    "half a surrogate pair": WHOLE.format("{}", 0, "[]").replace('"system": ""', '"system": "\\ud800"'),
    "not a number": WHOLE.format('{"temperature": NaN}', 0, "[]"),
    "empty": "",
}


def test_an_odd_session_is_an_error_line_and_the_conversation_goes_on(qmix, tmp_path):
    lines = [f"/load {tmp_path}/{number}" for number in range(len(ODD))]
    for number, content in enumerate(ODD.values()):
        (tmp_path / str(number)).write_text(content)
    (tmp_path / "latin").write_bytes(WHOLE.format("{}", 0, "[]").replace('"a"', '"\xe9"').encode("latin-1"))
    lines += [f"/load {tmp_path}/latin", "/load /dev/zero", "/load ~nobody-at-all/s", "/read /dev/zero", "/read ''"]
    done = qmix(*CHAT, "-q", stdin=typed(ASK, *lines, "/set stop \\x", "/set stop \\ud800", MORE))
    assert (done.status, len(done.lines)) == (1, len(lines) + 2)
    assert all(line.startswith("qmix: ") and "a bug" not in line for line in done.lines)
    for number, name in enumerate(ODD):
        assert done.lines[number].startswith(f"qmix: {tmp_path}/{number}: "), name
    assert done.lines[-2].startswith("qmix: /set stop \\x: ")
    assert done.lines[-1] == "qmix: /set stop: not UTF-8 text (character 1)"
    assert done.out == qmix(*CHAT, "-q", stdin=typed(ASK, MORE)).out


def test_bytes_that_are_not_utf_8_are_an_error_line(qmix):
    done = qmix(*CHAT, "-q", stdin=typed(ASK) + b"caf\xe9\n" + typed(MORE))
    assert done.err == "qmix: stdin: a line is not UTF-8 text (byte 3)\n"
    assert done.out == qmix(*CHAT, "-q", stdin=typed(ASK, MORE)).out
    refused = subprocess.run(
        [*COMMAND, *CHAT, "-s", b"caf\xe9"], input=b"", capture_output=True, timeout=LIMIT_SECONDS, check=False
    )
    assert (refused.returncode, refused.stderr) == (2, b"qmix: --system: not UTF-8 text (character 4)\n")


def test_a_latin_1_byte_on_a_terminal_is_an_error_line(qmix):
    typist = Typist(qmix, *GREEDY)
    try:
        os.write(typist.terminal.child_fd, b"caf\xe9 ")
        assert "qmix: this turn: not UTF-8 text (character 4)\r\n" in typist.enter("again")
        assert "prompt tokens" in typist.enter(ASK)
    finally:
        typist.terminal.close(force=True)


class Typed:
    """A reader of turns that are there already."""

    def __init__(self, *lines: str) -> None:
        self.lines = list(lines)

    def read(self) -> str:
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)

    def left_something(self) -> bool:
        return False


class Thinking:
    def __init__(self, describe) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        pass


@pytest.mark.parametrize("failure", [MemoryError(), RuntimeError("a library's"), StoreError("damaged"), EOFError()])
def test_whatever_fails_within_an_answer_costs_that_answer_alone(tiny, tmp_path, failure, monkeypatch):
    store = make_store(tiny, tmp_path / "store")
    said, shown = [], []
    with Runner(store, make_plan(store.layout, 2**40, 512, 2**28)) as runner:
        session = Session(runner, {"temperature": 0.0, "max_new_tokens": 12})
        kept = KeptChat(tmp_path / "chats", said.append)
        original, answers = runner.generate, iter(range(9))

        def generate(*arguments, **options):
            pieces = original(*arguments, **options)
            if next(answers) in (1, 2):
                yield next(pieces)
                pieces.close()
                raise failure
            yield from pieces

        monkeypatch.setattr(runner, "generate", generate)
        screen = Screen(shown.append, said.append, Thinking, None)
        chat = Chat(session, Typed(ASK, MORE, "/regen", MORE), screen, False, kept)
        chat.run()
        assert [turn.user for turn in session.conversation.turns] == [ASK, MORE]
        assert (chat.failed, len(said)) == (True, 2)
        assert all(line.startswith("qmix: ") and "\n" not in line for line in said)
        assert interrupted(tmp_path / "chats") == []
        (path,) = (tmp_path / "chats").iterdir()
        assert path.suffix == ".json"
