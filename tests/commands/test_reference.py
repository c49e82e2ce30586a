"""docs/commands.md says what the commands say."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qmix import errors
from qmix.commands import COMMANDS
from qmix.commands.general import GENERAL
from qmix.commands.reference import PATH


@pytest.mark.parametrize("columns", ["20", "300"])
def test_the_reference_is_current_and_the_same_on_any_terminal(columns):
    script = "from qmix.commands.reference import reference; print(reference(), end='')"
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={"COLUMNS": columns, "TERM": "dumb"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == PATH.read_text(), "run `make reference`"


def test_every_command_and_exit_code_is_there(qmix):
    page = PATH.read_text()
    for name in COMMANDS:
        section = page.split(f"## qmix {name}\n")[1].split("\n## ")[0]
        shown = {word.strip("`,") for word in qmix(name, "--help").out.split() if word.startswith("--")}
        general = {option for each in GENERAL for option in each.opts}
        shown -= general - {"--quiet"} if name == "chat" else general
        assert "--help" in shown
        assert shown - {"--help"} <= {word.strip("`,") for word in section.split()} | {"--help"}, name
    for error in vars(errors).values():
        if isinstance(error, type) and issubclass(error, errors.QmixError):
            assert f"| {error.exit_code} | {errors.EXIT_CODES[error.exit_code]} |" in page


def test_a_commands_summary_is_one_short_line(qmix):
    lines = qmix("--help").out.partition("Commands:\n")[2].splitlines()
    summaries = dict(line.split(maxsplit=1) for line in lines)
    assert list(summaries) == list(COMMANDS)
    assert {name: text for name, text in summaries.items() if len(text) > 60 or not text.endswith(".")} == {}
    assert {name: text for name, text in summaries.items() if "..." in text} == {}
