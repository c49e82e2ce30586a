"""`--live` on a real terminal: one screen, the answer on stdout, and the terminal as it was, however it ends."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import termios
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pexpect
import pyte
import pytest
from command import COMMAND, LIMIT_SECONDS
from rich.console import Console

from qmix.engine.figures import Figures, Memory, Requests
from qmix.terminal.expert_map import ExpertMap
from qmix.terminal.live import REFRESHES, LiveView

ASK = "To install a package,"
GREEDY = ("--temperature", "0", "--max-new-tokens", "60", "--ignore-eos")
LONG = ("generate", ASK, "-m", "tiny", "--seed", "1", "--ignore-eos", "--max-new-tokens", "1900", "--live")
ENTER, LEAVE = b"\x1b[?1049h", b"\x1b[?1049l"  # the terminal's second screen
HIDE, SHOW = b"\x1b[?25l", b"\x1b[?25h"  # the cursor


class Screen:
    """A command on a terminal, whose screen can be read."""

    def __init__(self, *argv: str | Path, columns: int = 80, rows: int = 24, **options) -> None:
        self._size, self.written, self._rest = (columns, rows), b"", b""
        self.first = self.screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self.screen)
        environment = {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"} | options.pop("environment", {})
        self.terminal = pexpect.spawn(
            options.pop("shell", COMMAND[0]),
            [*([] if options.pop("raw", False) else COMMAND[1:]), *map(str, argv)],
            dimensions=(rows, columns),
            env=os.environ | environment,
            timeout=LIMIT_SECONDS,
        )
        self.before = termios.tcgetattr(self.terminal.child_fd)

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def read(self) -> bool:
        """Take in what the command writes next; False at its end."""
        try:
            part = self.terminal.read_nonblocking(65536, 0.2)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.written += part
        self._show(part)
        return True

    def _show(self, part: bytes) -> None:
        """Feed the first or the second screen: pyte has only one."""
        *pieces, last = re.split(b"(" + re.escape(ENTER) + b"|" + re.escape(LEAVE) + b")", self._rest + part)
        cut = last.rfind(b"\x1b", -len(ENTER))
        last, self._rest = (last, b"") if cut < 0 else (last[:cut], last[cut:])
        for piece in (*pieces, last):
            if piece in (ENTER, LEAVE):
                self.screen = self.first if piece == LEAVE else pyte.Screen(*self._size)
                self._stream = pyte.ByteStream(self.screen)
            else:
                self._stream.feed(piece)

    def wait(self, pattern: str) -> str:
        """Read until the screen has a text, and return the screen."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while not re.search(pattern, self.text):
            assert self.read(), self.written[-2000:].decode(errors="replace")
            assert time.monotonic() < deadline, self.text
        return self.text

    def end(self) -> int | None:
        """Read to the end, and return the exit status, below zero for a signal."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while self.read():
            assert time.monotonic() < deadline, self.text
        self.after = termios.tcgetattr(self.terminal.child_fd)
        self.terminal.close()
        return self.terminal.exitstatus if self.terminal.signalstatus is None else -self.terminal.signalstatus

    def check_restored(self) -> None:
        """The first screen and the cursor are back, nothing is left of the second, and the keyboard is as before."""
        self.check_screen()
        assert self.after == self.before

    def check_screen(self) -> None:
        """The first screen and the cursor are back, and nothing is left of the second."""
        assert self.written.count(ENTER) == self.written.count(LEAVE) > 0
        assert self.written.rindex(LEAVE) > self.written.rindex(ENTER)
        assert self.written.rindex(SHOW) > self.written.rindex(HIDE)


@pytest.fixture
def open_screen(qmix) -> Iterator:
    """Screens, closed after the test."""
    there = []

    def begin(*argv, **options) -> Screen:
        there.append(Screen(*argv, **options))
        return there[-1]

    yield begin
    for screen in there:
        screen.terminal.close(force=True)


def outside(written: bytes) -> str:
    """Return what was written outside of the second screen."""
    kept = re.sub(re.escape(ENTER) + b".*?" + re.escape(LEAVE), b"", written, flags=re.DOTALL)
    return re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", kept).decode().replace("\r\n", "\n")


def test_an_answer_is_shown_beside_the_figures_and_stays_when_they_are_gone(qmix, open_screen):
    screen = open_screen("generate", ASK, "-m", "tiny", *GREEDY, "--live")
    shown = screen.wait(r"decode +[\d.]+ tok/s[\s\S]*ram 48")
    assert screen.end() == 0
    screen.check_restored()
    wanted = qmix("generate", ASK, "-m", "tiny", *GREEDY).out
    assert re.fullmatch(re.escape(wanted) + r"\d+ prompt tokens.*seed \d+\n", outside(screen.written))
    answer = shown.split("use\n\n")[-1].replace("\n", " ").strip()
    assert wanted.replace("\n", " ").strip().startswith(answer[:40])


def test_stdout_gets_the_answer_alone_and_at_once(qmix, open_screen, tmp_path):
    script = f"{' '.join(COMMAND)} generate '{ASK}' -m tiny {' '.join(GREEDY)} --live > {tmp_path}/out"
    screen = open_screen("-c", script, shell="/bin/sh", raw=True)
    screen.wait(r"decode +[\d.]+ tok/s")
    assert screen.end() == 0
    screen.check_restored()
    assert (tmp_path / "out").read_text() == qmix("generate", ASK, "-m", "tiny", *GREEDY).out
    assert re.fullmatch(r"\d+ prompt tokens.*seed \d+\n", outside(screen.written))


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_gives_the_terminal_back_with_the_answer_so_far(open_screen, sent, status):
    screen = open_screen(*LONG)
    screen.wait(r"tokens +[2-9]\d")
    os.kill(screen.terminal.pid, sent)
    assert screen.end() == status
    screen.check_restored()
    left = outside(screen.written)
    assert len(left.split()) > 10
    assert "Traceback" not in left
    assert left.endswith("\nqmix: interrupted\n") == (sent == signal.SIGINT)


@pytest.fixture
def shell(open_screen) -> Screen:
    """An interactive bash, which has job control."""
    screen = open_screen("--norc", "--noprofile", "-i", shell="/bin/bash", raw=True, environment={"PS1": "sh> "})
    screen.wait(r"sh>\s*$")
    return screen


def typed(*argv: str) -> str:
    return " ".join(shlex.quote(str(part)) for part in (*COMMAND, *argv)) + "\r"


def test_ctrl_z_gives_the_terminal_to_the_shell_and_fg_draws_again(shell):
    shell.terminal.send(typed(*LONG))
    shell.wait(r"tokens +[2-9]\d")
    shell.terminal.send("\x1a")
    shell.wait(r"Stopped[\s\S]*sh>\s*$")
    assert shell.written.count(ENTER) == shell.written.count(LEAVE) == 1
    assert shell.written.rindex(SHOW) > shell.written.rindex(HIDE)
    shell.terminal.send("echo be''tween\r")
    shell.wait(r"between\s+sh>\s*$")
    shell.terminal.send("fg\r")
    shell.wait(r"qmix generate: tiny +0:\d\d[\s\S]*tokens +\d+")
    shell.terminal.sendintr()
    shell.wait(r"qmix: interrupted\s+sh>\s*$")
    assert shell.written.count(ENTER) == shell.written.count(LEAVE) == 2
    shell.check_screen()


def test_in_the_background_it_draws_nothing_until_it_is_back(shell):
    shell.terminal.send(typed(*LONG))
    shell.wait(r"tokens +[2-9]\d")
    shell.terminal.send("\x1a")
    shell.wait(r"Stopped[\s\S]*sh>\s*$")
    shell.terminal.send("bg; echo re''ady; sleep 1\r")
    shell.wait(r"ready\s+sh>\s*$")
    assert shell.written.count(ENTER) == 1
    shell.terminal.send("fg\r")
    shell.wait(r"qmix generate: tiny +0:\d\d[\s\S]*tokens +\d+")
    shell.terminal.send("\x1a")
    shell.wait(r"Stopped[\s\S]*sh>\s*$")
    shell.terminal.send("kill %1; fg\r")
    shell.wait(r"Terminated[\s\S]*sh>\s*$")
    shell.check_screen()


def test_ctrl_z_at_a_chat_s_prompt_and_in_its_answer(shell):
    shell.terminal.send(typed("chat", "tiny", "--seed", "1", "--ignore-eos", "--live"))
    for prompt in (True, False):
        shell.wait(r">>>\s*$")
        if not prompt:
            shell.terminal.send("How?\r")
            shell.wait(r"tokens +[2-9]\d")
        shell.terminal.send("\x1a")
        shell.wait(r"Stopped[\s\S]*sh>\s*$")
        shell.terminal.send("fg\r")
    shell.wait(r"qmix chat: tiny +0:\d\d[\s\S]*tokens +\d+")
    shell.terminal.sendintr()
    shell.wait(r"stopped after \d+ tokens\s+>>>\s*$")
    shell.terminal.send("\x04")
    shell.wait(r"sh>\s*$")
    shell.check_screen()


def test_an_error_gives_the_terminal_back_and_is_told_below(open_screen, qmix, tiny, tmp_path):
    """An expert is damaged that a later token needs."""
    store = tmp_path / "store"
    assert qmix("quantize", tiny, store).status == 0
    for layer in range(6):
        with (store / f"experts-{layer:05}.safetensors").open("r+b") as file:
            file.seek(-4096, os.SEEK_END)
            file.write(bytes(4096))
    smallest = json.loads(qmix("plan", store, "--json").out)["smallest"]
    screen = open_screen("generate", ASK, "-m", store, "--ram", smallest, *GREEDY, "--live")
    assert screen.end() == 1
    screen.check_restored()
    assert "is damaged" in outside(screen.written)


def test_it_draws_a_few_times_a_second_and_never_wipes_the_screen(open_screen):
    screen = open_screen(*LONG)
    screen.wait(r"tokens +[2-9]\d")
    begun, drawn = time.monotonic(), screen.written.count(b"\x1b[H")
    screen.wait(r"tokens +1\d\d|tokens +[2-9]\d\d")
    seconds, drawn = time.monotonic() - begun, screen.written.count(b"\x1b[H") - drawn
    assert drawn <= REFRESHES * seconds + 2
    assert not re.findall(rb"\x1b\[[0-3]?[JK]", screen.written[screen.written.index(ENTER) :])
    screen.terminal.kill(signal.SIGTERM)
    screen.end()


def test_in_a_chat_it_is_there_while_an_answer_comes_and_gone_at_the_prompt(open_screen, qmix):
    screen = open_screen("chat", "tiny", *GREEDY, "--live", columns=200)  # so that no line is folded
    for _ in range(2):
        screen.wait(r">>>\s*$")
        screen.terminal.send("How do I install a package?\r")
        screen.wait(r"qmix chat: tiny +0:0")
    screen.wait(r"seed \d+\n>>>\s*$")
    first = qmix("chat", "tiny", *GREEDY, stdin=b"How do I install a package?").out.split("\n")[0]
    assert first[:70] in screen.text
    screen.terminal.send("\x04")
    assert screen.end() == 0
    screen.check_restored()
    assert screen.written.count(ENTER) == 2


def test_ctrl_c_in_a_live_chat_stops_the_answer_and_not_the_chat(open_screen):
    screen = open_screen("chat", "tiny", "--temperature", "1", "--seed", "1", "--ignore-eos", "--live", columns=200)
    screen.wait(r">>>\s*$")
    screen.terminal.send("How?\r")
    screen.wait(r"tokens +[2-9]\d")
    screen.terminal.sendintr()
    screen.wait(r"stopped after \d+ tokens\n>>>\s*$")
    screen.terminal.send("\x04")
    assert screen.end() == 0
    screen.check_restored()


def test_a_batch_says_how_far_it_is(open_screen, tmp_path):
    lines = [{"id": str(index), "prompt": ASK, "max_tokens": 60, "ignore_eos": True} for index in range(12)]
    (tmp_path / "in").write_text("".join(json.dumps(line) + "\n" for line in lines))
    screen = open_screen("batch", tmp_path / "in", "-o", tmp_path / "out", "-m", "tiny", "--batch", "4", "--live")
    screen.wait(r"running +4 of 4[\s\S]*of 12 lines, \d+%, [\d.]+ tok/s")
    assert screen.end() == 0
    screen.check_restored()
    assert len((tmp_path / "out").read_text().splitlines()) == 12
    assert outside(screen.written).splitlines()[-1].startswith("12 of 12 lines, 720 new tokens")


def test_a_server_shows_its_requests_and_its_address(open_screen, tmp_path):
    options = {"XDG_STATE_HOME": str(tmp_path)}
    screen = open_screen("serve", "tiny", "--port", "0", "--batch", "3", "--live", environment=options)
    screen.wait(r"running +0 of 3[\s\S]*limit +waiting for requests 100%[\s\S]*at http://127.0.0.1:\d+: 3 requests")
    screen.terminal.sendintr()
    assert screen.end() == 130
    screen.check_restored()
    assert re.search(r"^serving tiny at http://\S+: 3 requests at once", outside(screen.written), re.MULTILINE)


@pytest.mark.parametrize(
    "argv",
    [("generate", ASK), ("chat", "tiny"), ("batch", "in", "-o", "out"), ("serve", "tiny", "--port", "0")],
    ids=lambda argv: argv[0],
)
def test_without_a_terminal_it_is_refused_by_name(qmix, argv, tmp_path):
    (tmp_path / "in").write_text('{"id": "1", "prompt": "x"}\n')
    done = qmix(*argv, "--live", cwd=tmp_path)
    assert (done.status, done.out) == (2, "")
    assert done.err == "qmix: --live: stderr is not a terminal; run it in one, or leave --live out\n"


def test_a_terminal_that_cannot_move_its_cursor_is_refused(qmix):
    child = pexpect.spawn(COMMAND[0], [*COMMAND[1:], "generate", ASK, "--live"], env=os.environ | {"TERM": "dumb"})
    child.expect_exact("--live: the terminal cannot move its cursor (TERM); leave --live out", timeout=LIMIT_SECONDS)
    child.close(force=True)


# What is drawn, without a model


def figures(layers: int, experts: int = 8) -> Figures:
    tiers = tuple(
        tuple(("gpu:0", "ram", "disk")[(layer + expert) % 3] for expert in range(experts)) for layer in range(layers)
    )
    use = tuple(tuple(float(layer == expert) for expert in range(experts)) for layer in range(layers))
    return Figures(
        seconds=75.0,
        tiers=tiers,
        use=use,
        hits=use,
        layer=11,
        prompt=512,
        prefill=1234.0,
        decode=4.567,
        new_tokens=99,
        read_rate=1.23e9,
        bytes_read=4_560_000_000,
        hit_rate=0.931,
        memory=(Memory("RAM", 12_300_000_000, 16_100_000_000), Memory("gpu:0", 11_200_000_000, 12_900_000_000)),
        requests=Requests(4, 2, 32),
        limits=(("disk", 0.62), ("experts on the CPU", 0.3), ("GPU", 0.08), ("waiting for requests", 0.0)),
    )


def drawn(view, columns: int, rows: int = 24, **options) -> list[str]:
    console = Console(width=columns, height=rows, force_terminal=True, legacy_windows=False, **options)
    with console.capture() as captured:
        console.print(view)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", captured.get())
    return plain.rstrip("\n").split("\n")


@pytest.mark.parametrize("layers", [32, 56])
@pytest.mark.parametrize("columns", [80, 60])
def test_every_expert_and_an_answer_fit_a_screen(layers, columns):
    lines = drawn(LiveView("qmix generate: x", figures(layers), "words " * 400, "a note"), columns)
    assert len(lines) <= 24
    assert max(map(len, lines)) <= columns
    rows = [line for line in lines if re.match(r"  [0-7] ", line)]
    assert len(rows) == 8
    assert rows[7][11] == "#"
    text = "\n".join(lines)
    for wanted in ("4.57 tok/s", "1234 tok/s", "1.23 GB/s", "93.1%", "12.3 GB of 16.1 GB", "11.2 GB of 12.9 GB"):
        assert wanted in text
    assert re.search(r"running +4 of 32", text)
    assert re.search(r"waiting +2\b", text)
    assert "limit   disk 62%, experts on the CPU 30%, GPU 8%" in text
    assert "512 tokens, layer 12 of 56" in text or layers == 32
    assert lines[0].endswith("1:15")
    assert "words words" in lines[-1]


@pytest.mark.parametrize(("columns", "rows"), [(40, 24), (20, 10), (5, 3), (200, 60)])
def test_a_screen_of_any_size_is_never_left(columns, rows):
    for layers, experts in ((56, 8), (6, 128), (1, 1)):
        view = LiveView("a long title " * 9, figures(layers, experts), "word\t漢字 " * 99, "note " * 50)
        lines = drawn(view, columns, max(rows, 1))
        assert max(map(len, lines)) <= columns
    assert any(re.match(r"  0 ", line) for line in drawn(LiveView("x", figures(56)), columns, rows)) == (columns > 60)


def test_an_answer_cannot_steer_the_terminal():
    lines = drawn(LiveView("x", figures(6), "before \x1b[2J\x07\x9b31m after\nlast"), 80)
    assert lines[-2:] == ["before \ufffd[2J\ufffd\ufffd31m after", "last"]


def test_use_is_drawn_with_and_without_colours():
    """The expert of most use has the most ink; an unused one has none. Without colours, letters tell both."""
    tiers, use = (("gpu:0", "ram"), ("disk", "disk")), ((8.0, 4.0), (1.0, 0.0))
    assert drawn(ExpertMap(tiers, use), 40)[1:3] == ["  0 #·", "  1 + "]
    assert drawn(ExpertMap(tiers, use), 40, no_color=True)[1:3] == ["  0 0*", "  1 R."]
    assert drawn(ExpertMap(tiers), 40, no_color=True)[1:3] == ["  0 0.", "  1 r."]
    view = LiveView("x", replace(figures(1, 2), tiers=(("ram", "ram"),), use=((0.0, 0.0),)))
    assert any(line.startswith("  0  ") or line == "  0" for line in drawn(view, 80))
