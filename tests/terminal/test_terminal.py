"""Commands on a real terminal, interrupted, and with closed pipes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pexpect
import psutil
import pytest
from checkpoints import TINY_CONFIG, random_weights, write_checkpoint
from command import COMMAND, LIMIT_SECONDS

from qmix.progress import Progress
from qmix.terminal.progress import JobDisplay, ProgressDisplay

PROMPT = "To install a package,"
LONG = ("generate", PROMPT, "-m", "tiny", "--seed", "1", "--ignore-eos", "--max-new-tokens", "2000")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
GOES_ON = "qmix: interrupted; run the same command again to continue\r\n"


def on_terminal(*argv: str | Path, columns: int = 100, **environment: str) -> pexpect.spawn:
    return pexpect.spawn(
        COMMAND[0],
        [*COMMAND[1:], *map(str, argv)],
        dimensions=(24, columns),
        env=os.environ | environment,
        encoding="utf-8",
        timeout=LIMIT_SECONDS,
    )


def end(terminal: pexpect.spawn) -> str:
    """Return the rest of the output up to the end of the process."""
    terminal.expect(pexpect.EOF)
    terminal.close()
    return terminal.before


def wait_until(condition: Callable[[], bool], terminal: pexpect.spawn) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert terminal.isalive(), end(terminal)
        assert time.monotonic() < deadline
        time.sleep(0.001)


@dataclass(frozen=True)
class Interrupted:
    """A generation ended by Ctrl-C: the pieces of text before it, and the output after it."""

    pieces: list[str]
    rest: str
    status: int | None
    settings: tuple[list, list]  # of the terminal, before and after


@pytest.fixture(scope="module")
def interrupted(first_use) -> Interrupted:
    terminal = on_terminal(*LONG, XDG_CACHE_HOME=str(first_use.cache))
    before = termios.tcgetattr(terminal.child_fd)
    pieces = [terminal.read_nonblocking(4096, LIMIT_SECONDS) for _ in range(20)]
    terminal.sendintr()
    terminal.expect(pexpect.EOF)
    after = termios.tcgetattr(terminal.child_fd)
    terminal.close()
    return Interrupted(pieces, terminal.before, terminal.exitstatus, (before, after))


def test_text_streams_to_the_terminal_as_it_is_made(qmix, interrupted):
    shown = "".join(interrupted.pieces).replace("\r\n", "\n")
    whole = qmix(*LONG[:-1], "60").out.rstrip("\n")
    assert len(shown) > 40
    assert whole.startswith(shown[: len(whole)])
    assert "\x1b" not in shown


def test_ctrl_c_ends_a_generation_at_once_in_one_line(interrupted):
    text, _, told = interrupted.rest.rpartition("^C\r\n")
    assert (interrupted.status, told) == (130, "qmix: interrupted\r\n")
    assert "tokens" not in text  # the line that an answer of all its tokens ends with
    before, after = interrupted.settings
    assert before == after


def test_an_impatient_second_ctrl_c_shows_no_traceback(qmix):
    terminal = on_terminal(*LONG)
    terminal.expect(r"\w+ \w+")
    terminal.sendintr()
    terminal.expect("interrupted\r\n")
    terminal.sendintr()
    assert end(terminal) in ("", "^C")
    assert terminal.exitstatus == 130 or terminal.signalstatus == signal.SIGINT


def test_no_prompt_on_a_terminal_is_an_error_and_no_waiting(qmix):
    terminal = on_terminal("generate")
    assert end(terminal) == "qmix: no prompt: give one as an argument or on stdin\r\n"
    assert terminal.exitstatus == 2


@pytest.mark.parametrize("columns", [40, 15])
def test_a_plan_stays_within_a_narrow_terminal(qmix, columns):
    terminal = on_terminal("plan", "tiny", columns=columns)
    shown, _, command = ESCAPES.sub("", end(terminal)).partition("run it:")
    lines = shown.splitlines()
    assert terminal.exitstatus == 0
    assert re.match(r"\s+qmix generate -m tiny --ram \d+MB", command)  # in one piece, however narrow
    assert len(lines) > 15
    assert max(map(len, lines)) <= columns


@pytest.fixture(scope="module")
def large(tiny, tmp_path_factory) -> Path:
    """Return a checkpoint of 133 MB, which takes some time to quantise. Its name looks like markup."""
    sizes = {"hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 3, "num_local_experts": 8}
    directory = tmp_path_factory.mktemp("large") / "[" / "x]"
    return write_checkpoint(directory, random_weights(TINY_CONFIG | sizes), TINY_CONFIG | sizes, 3, tokenizer=tiny)


def begun(directory: Path) -> bool:
    """Return whether about a tenth of the large store is written."""
    written = directory.glob("*.safetensors") if directory.is_dir() else ()
    return sum(path.stat().st_blocks * 512 for path in written) > 4e6


@pytest.fixture(scope="module")
def resumed(large, tmp_path_factory) -> Iterator[list[str]]:
    """Return the terminal output of an interrupted quantisation, and that of the same command again."""
    store = tmp_path_factory.mktemp("stores") / "store"
    partial = store.with_name("store.partial")
    first = on_terminal("quantize", large, store)
    wait_until(lambda: begun(partial), first)
    os.kill(first.pid, signal.SIGSTOP)  # it stays where it is until the Ctrl-C has come
    first.sendintr()
    os.kill(first.pid, signal.SIGCONT)
    shown = [end(first)]
    assert first.exitstatus == 130
    assert not store.exists()
    inode = (partial / "experts-00000.safetensors").stat().st_ino
    second = on_terminal("quantize", large, store, columns=40)
    shown.append(end(second))
    assert second.exitstatus == 0
    assert not partial.exists()
    assert (store / "experts-00000.safetensors").stat().st_ino == inode
    return shown


def test_ctrl_c_stops_quantizing_and_says_how_it_goes_on(resumed):
    assert resumed[0].endswith("\r\n" + GOES_ON)
    assert "Traceback" not in resumed[0]
    assert resumed[0].count("\x1b[?25l") == resumed[0].count("\x1b[?25h") == 1  # the cursor, hidden and shown


def test_the_same_command_goes_on_where_it_was(resumed):
    done = [float(figure) for figure in re.findall(r"([\d.]+)/132.9 MB", ESCAPES.sub("", resumed[1]))]
    assert 2 < done[0] < done[-1] == 132.9


def test_the_bar_shows_bytes_rate_and_time_left_on_any_width(resumed):
    for shown, columns in zip(resumed, (100, 40), strict=True):
        lines = re.split(r"[\r\n]+", ESCAPES.sub("", shown).replace("^C", ""))
        frames = [line for line in lines if "132.9 MB" in line]
        assert re.search(r" [━╸╺]+ [\d.]+/132.9 MB ([\d.]+ [kMG]B/s|\?) (-|\d):[-\d]{2}:[-\d]{2}", frames[-1]), frames[
            -1
        ]
        assert max(map(len, frames)) <= columns, frames
    assert re.search(r"132.9/132.9 MB [\d.]+ [kMG]B/s 0:00:00", frames[-1]), frames[-1]
    assert ESCAPES.sub("", resumed[1]).endswith("store: 35.9 MB\r\n")  # colorama, if a library has it, resets colours


def test_ctrl_c_while_a_model_is_made_ready_leaves_nobody_writing(commands, first_use, large, tmp_path):
    """The quantising process is suspended: the command waits for it to end, so that the next one can start."""
    (tmp_path / "qmix").mkdir()
    for measured in (first_use.cache / "qmix").glob("interpreter-*.json"):
        shutil.copy(measured, tmp_path / "qmix")
    terminal = on_terminal("generate", "x", "-m", large, XDG_CACHE_HOME=str(tmp_path))
    wait_until(lambda: any(map(begun, (tmp_path / "qmix").glob("*.partial"))), terminal)
    (quantizer,) = psutil.Process(terminal.pid).children()
    quantizer.suspend()
    try:
        terminal.sendintr()
        terminal.expect_exact("^C")
        with pytest.raises(pexpect.TIMEOUT):
            terminal.expect("interrupted", timeout=0.5)
    finally:
        quantizer.resume()
    assert end(terminal).endswith("\r\n" + GOES_ON)
    assert terminal.exitstatus == 130
    assert not quantizer.is_running()
    again = commands("generate", "x", "-m", large, XDG_CACHE_HOME=str(tmp_path))
    assert again.lines[-1].endswith("outside the model's vocabulary")  # made ready, and of 96 words only


@pytest.fixture
def generating(qmix) -> Iterator[subprocess.Popen]:
    """Yield a long generation with pipes instead of a terminal, during its answer."""
    pipe = subprocess.PIPE
    with subprocess.Popen([*COMMAND, *LONG], stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe) as process:
        assert process.stdout.read(5)
        yield process
        process.kill()


def test_nobody_reading_on_ends_it_without_a_word(generating):
    generating.stdout.close()
    assert generating.stderr.read() == b""
    assert generating.wait(LIMIT_SECONDS) == 1


def test_sigterm_ends_it(generating):
    generating.terminate()
    assert generating.stderr.read() == b""
    assert generating.wait(LIMIT_SECONDS) == -signal.SIGTERM


@dataclass
class Clock:
    now: float = 0.0


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("qmix.terminal.progress.time.monotonic", lambda: clock.now)
    return clock


def test_patience_counts_from_the_first_call(capsys, clock):
    """Short work is not shown; longer work is."""
    display = ProgressDisplay("loading x", patience=2.0)
    for clock.now, done in ((100.0, 1), (101.0, 2)):
        display(Progress(done * 10**6, 4 * 10**6))
    assert capsys.readouterr().err == ""
    clock.now = 102.5
    display(Progress(3 * 10**6, 4 * 10**6))
    assert capsys.readouterr().err == "loading x: 3 MB of 4 MB, 75%\n"


def test_a_log_gets_the_first_line_one_each_ten_seconds_and_the_last(capsys, clock):
    with ProgressDisplay("reading x") as display:
        for clock.now, done, note in ((100, 0, ""), (105, 1, ""), (110, 10, "waiting"), (112, 11, "")):
            display(Progress(done * 10**6, 2000 * 10**6, note))
    assert capsys.readouterr().err.splitlines() == [
        "reading x: 0 B of 2 GB, 0%",
        "reading x: 10 MB of 2 GB, 0%, 1 MB/s, 33 min left (waiting)",
        "reading x: 11 MB of 2 GB, 1%, 917 kB/s, 36 min left",
    ]


def test_a_log_of_requests_gets_a_line_each_ten_seconds(capsys, clock):
    clock.now = 100.0
    with JobDisplay("batch") as display:
        for clock.now in (101.0, 109.0, 111.0, 112.0):
            display.show(1, 2, ["1 of 2 lines", "9 tok/s", ""], count="1/2 lines", rate="9 tok/s", left="")
    assert capsys.readouterr().err == "batch: 1 of 2 lines, 9 tok/s\n"
