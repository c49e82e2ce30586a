"""Signals reach what draws on the terminal at a moment at which it can give the terminal back."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys

import pytest
from rich.console import Console
from rich.live import Live

from qmix.terminal.job_control import JobControl

SHOW = "\x1b[?25h"
NESTED = """
import os, signal, sys
from rich.console import Console
from rich.live import Live
from qmix.terminal.job_control import JobControl

def live(): return Live(console=Console(force_terminal=True), auto_refresh=False)

outer, inner = live(), live()
with JobControl(lambda: outer) as one, JobControl(lambda: inner, lambda: print("told", flush=True)) as two:
    outer.start()
    inner.start()
    with one.undisturbed(), two.undisturbed():
        os.kill(os.getpid(), signal.SIGTERM)
        print("whole", flush=True)
    print("never")
"""


def test_a_sigterm_in_a_change_of_the_terminal_comes_after_it_and_reaches_every_display():
    done = subprocess.run([sys.executable, "-c", NESTED], check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert done.stdout.count(SHOW) == 2
    assert done.stdout.index("whole") < done.stdout.index(SHOW)
    assert "told" in done.stdout
    assert "never" not in done.stdout


def test_an_interrupt_in_a_change_comes_after_it():
    steps = []

    def change() -> None:
        with JobControl(lambda: None) as control, control.undisturbed():
            os.kill(os.getpid(), signal.SIGINT)
            steps.append("changed")

    with pytest.raises(KeyboardInterrupt):
        change()
    assert steps == ["changed"]


def test_handlers_are_those_of_before_when_it_ends_and_ignored_signals_stay_ignored():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGTSTP, signal.SIGCONT)
    before = [signal.getsignal(number) for number in numbers]
    ignored = signal.signal(signal.SIGTSTP, signal.SIG_IGN)
    try:
        with JobControl(lambda: None):
            assert signal.getsignal(signal.SIGTERM) not in before
            assert signal.getsignal(signal.SIGTSTP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTSTP, ignored)
    assert [signal.getsignal(number) for number in numbers] == before


def test_what_goes_on_without_a_terminal_stays_off_the_screen():
    live = Live(console=Console(file=io.StringIO(), force_terminal=True), auto_refresh=False)
    stopped = []
    before = signal.signal(signal.SIGTSTP, lambda *_: stopped.append(live.is_started))
    try:
        with JobControl(lambda: live):
            live.start()
            os.kill(os.getpid(), signal.SIGTSTP)
        assert (stopped, live.is_started) == ([False], False)
    finally:
        signal.signal(signal.SIGTSTP, before)
        live.stop()
