"""`qmix` without arguments, `qmix generate` with a model's name as its prompt, and completion in real shells."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
from command import COMMAND, LIMIT_SECONDS

HEAVY = {"torch", "transformers", "numba", "huggingface_hub", "rich"}
BIN = Path(sys.executable).parent
BASH = """
eval "$(qmix completion bash)"
complete_words() {
    COMP_WORDS=("$@"); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=()
    _qmix_completion qmix 2>/dev/null
    echo "${COMPREPLY[*]}"
}
"""


def screen(*argv: str, **environment: str) -> tuple[list[str], int]:
    """The lines that a command leaves on a terminal of 80 columns, and its exit code."""
    terminal = pexpect.spawn(
        COMMAND[0],
        [*COMMAND[1:], *argv],
        dimensions=(24, 80),
        env=os.environ | environment,
        encoding="utf-8",
        timeout=LIMIT_SECONDS,
    )
    terminal.expect(pexpect.EOF)
    terminal.close()
    return terminal.before.splitlines(), terminal.exitstatus


def test_without_arguments_five_lines_tell_what_runs_here(tiny_cache):
    lines, status = screen()
    assert (len(lines), status) == (5, 0)
    assert " of RAM to use, " in lines[0]
    told = r" +([\d.e+]+ tok/s, \d+ of {} experts in memory, [\d.]+ GB of disk( \(.* free\))?|does not fit; needs .*)"
    assert re.fullmatch("mixtral-8x7b" + told.format(256), lines[1])
    assert re.fullmatch("mixtral-8x22b" + told.format(448), lines[2])
    assert lines[3] == "rates: typical; `qmix doctor` measures this machine, in a minute"
    assert lines[4] == "next: qmix doctor  (qmix --help lists all commands)"


def test_without_arguments_and_terminal_it_is_the_help(qmix):
    done = qmix()
    assert done.status == 2
    assert "Usage: qmix [OPTIONS] COMMAND [ARGS]..." in done.out + done.err


def test_the_first_lines_measure_nothing_and_load_no_torch(tmp_path):
    script = (
        "import sys\nfrom qmix.commands.welcome import welcome\nprint(len(welcome()))\n"
        "print(sorted({'torch', 'transformers', 'numba'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.splitlines() == ["5", "[]"]
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (("tiny", "Hello you"), "qmix generate -m tiny 'Hello you'"),
        (("tiny",), "qmix generate -m tiny PROMPT"),
        (("mixtral-8x7b", "Hello"), "qmix generate -m mixtral-8x7b Hello"),
        (("mistralai/Mixtral-8x7B-v0.1", "Hello"), "qmix generate -m mistralai/Mixtral-8x7B-v0.1 Hello"),
        (("Hello", "you"), "qmix generate 'Hello you'"),
    ],
)
def test_a_model_as_the_prompt_is_caught_with_the_line_to_type(qmix, argv, line):
    done = qmix("generate", *argv)
    assert (done.status, done.out) == (2, "")
    assert done.err.endswith(f"`{line}`\n")


def test_a_store_as_the_prompt_is_caught_too(qmix, first_use):
    assert f"`qmix generate -m {first_use.store} Hi`" in qmix("generate", first_use.store, "Hi").err
    assert qmix("generate", "and/or", "-m", "tiny", "--max-new-tokens", "1").status == 0
    assert qmix("generate", "tiny", "-m", "tiny", "--max-new-tokens", "1").status == 0


def completed(shell_line: str, **environment: str) -> list[str]:
    run = subprocess.run(
        ["bash", "--norc", "-c", f"{BASH}\ncomplete_words {shell_line}"],
        env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.split()


def test_bash_completes_commands_options_models_and_stores(tiny_cache, first_use):
    (identity,) = re.findall(r"-([0-9a-f]{12})$", first_use.store.name)
    assert completed("qmix pu") == ["pull"]
    assert completed("qmix chat --tempera") == ["--temperature"]
    assert completed("qmix generate -m ti") == ["tiny"]
    assert completed("qmix plan mixtral-8x2") == ["mixtral-8x22b"]
    assert completed(f"qmix rm {identity[:4]}") == [identity]
    assert completed("qmix verify ''") == ["tiny"]
    assert completed("qmix completion z") == ["zsh"]


def test_bash_completes_in_an_interactive_shell(qmix, tmp_path):
    shell = pexpect.spawn(
        "bash",
        ["--norc", "--noprofile", "-i"],
        env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "PS1": "$ ", "TERM": "dumb"},
        encoding="utf-8",
        timeout=LIMIT_SECONDS,
    )
    shell.sendline('eval "$(qmix completion bash)"; echo re""ady')
    shell.expect_exact("ready\r\n")
    shell.send("qmix cha\t")
    shell.expect_exact("qmix chat ")
    shell.send("ti\t")
    shell.expect_exact("tiny")
    shell.close(force=True)


@pytest.mark.parametrize(
    ("shell", "argv"),
    [
        ("fish", ["-c", "qmix completion fish | source; complete --do-complete 'qmix chat ti'"]),
        ("zsh", ["-fc", 'autoload -Uz compinit; compinit -D -u; eval "$(qmix completion zsh)"; print $_comps[qmix]']),
    ],
)
def test_other_shells_take_the_script(qmix, shell, argv):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    run = subprocess.run(
        [shell, *argv],
        env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == ["tiny" if shell == "fish" else "_qmix_completion"], run.stderr


def test_completion_imports_nothing_heavy(qmix):
    script = (
        f"import sys, cli\nsys.argv = ['qmix']\ntry: cli.main()\nfinally: print(sorted({HEAVY} & set(sys.modules)))"
    )
    words = {"_QMIX_COMPLETE": "bash_complete", "COMP_WORDS": "qmix chat ti", "COMP_CWORD": "2"}
    run = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | words, capture_output=True, text=True, check=False
    )
    assert run.stdout.splitlines() == ["plain,tiny", "[]"], run.stderr
