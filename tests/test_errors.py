"""Errors name arguments to callers from Python, and options to users of the command line."""

from __future__ import annotations

import ast
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from checkpoints import TINY_CONFIG, random_weights, write_checkpoint

import qmix
from qmix.checkpoint import open_checkpoint
from qmix.commands import COMMANDS, OPTIONS, Commands, in_options
from qmix.engine.sampling import Sampling
from qmix.errors import DoesNotFitError, QmixError, UsageError, arg
from qmix.plan.memory import check_memory
from qmix.store.child import quantize_in_child
from qmix.store.sources import open_source

ROOT = Path(qmix.__file__).parents[1]
LIBRARY = [
    path
    for room in ("qmix", "calibration")
    for path in sorted((ROOT / room).rglob("*.py"))
    if "commands" not in path.relative_to(ROOT).parts
]
SLASH_COMMANDS = {"qmix/chat/slash.py": "--cache"}  # which have options of their own
SHELL = re.compile("`[^`]*`|hf download .*")  # lines to type in a shell


def texts(path: Path) -> Iterator[str]:
    """Yield the strings of a source file, without docstrings."""
    tree = ast.parse(path.read_text())
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.value


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_option_stands_in_the_library(path: Path) -> None:
    own = SLASH_COMMANDS.get(str(path.relative_to(ROOT)), "\0")
    assert [text for text in texts(path) if re.search("--[a-z]", SHELL.sub("", text).replace(own, ""))] == []


def test_every_marked_argument_is_an_option_of_a_command() -> None:
    group = Commands("qmix")
    context = click.Context(group)
    commands = [group.get_command(context, command) for command in COMMANDS]
    commands += [inner for command in commands for inner in getattr(command, "commands", {}).values()]
    options = {name for command in commands for parameter in command.params for name in parameter.opts}
    sources = "\n".join(path.read_text() for path in LIBRARY if path.name != "errors.py")
    marked = set(re.findall(r"""\barg\(["']([a-z_]+)""", sources))
    assert {"ram", "context", "attention", "output"} <= marked
    for name in marked:
        assert in_options(QmixError(arg(name))) in options, name
    assert set(OPTIONS) <= marked


def test_an_argument_is_shown_by_its_name_or_as_an_option() -> None:
    error = UsageError(f"{arg('batch_tokens')} 9: give {arg('ram', '9MiB')}, or {arg('attention', 'sdpa')}")
    assert str(error) == "batch_tokens 9: give ram='9MiB', or attention='sdpa'"
    assert in_options(error) == "--batch-tokens 9: give --ram 9MiB, or --attn sdpa"
    wrapped = UsageError(f"line 3: {error.message}")
    assert str(wrapped) == f"line 3: {error}"
    assert in_options(wrapped) == f"line 3: {in_options(error)}"


ERRORS = {
    "ram": (
        lambda: check_memory(2**30, 2**20, 7),
        "7 tokens take 1.07 GB of memory, the budget is 1.05 MB; take fewer {}, or {}",
        ("tokens", "ram='1074MB'"),
        ("--tokens", "--ram 1074MB"),
    ),
    "context": (
        lambda: qmix.load("tiny", context=99999),
        "{} 99999: must be 1 to 2048, the model's longest",
        ("context",),
        ("--context",),
    ),
    "attention": (
        lambda: qmix.load("tiny", attention="none"),
        "{} 'none': choose one of eager, sdpa, flash_attention_2",
        ("attention",),
        ("--attn",),
    ),
    "precision": (
        lambda: qmix.load("tiny", precision="q4"),
        "{}: 'q4' is not a precision; choose one of nf4, fp4, int8, half",
        ("precision",),
        ("--precision",),
    ),
    "top_p": (lambda: Sampling(top_p=0), "{} 0: must be above 0 and at most 1", ("top_p",), ("--top-p",)),
    "stop": (lambda: Sampling(stop=("",)), "{} '': must not be empty", ("stop",), ("--stop",)),
}


@pytest.mark.parametrize("name", ERRORS)
def test_python_reads_arguments_and_the_command_line_options(name: str) -> None:
    fail, text, arguments, options = ERRORS[name]
    with pytest.raises(QmixError) as raised:
        fail()
    assert str(raised.value) == text.format(*arguments)
    assert in_options(raised.value) == text.format(*options)


def test_arguments_stay_marked_on_their_way_out_of_a_child_process(tmp_path: Path) -> None:
    weights = random_weights(TINY_CONFIG)
    weights["model.norm.weight"][5] = 70000
    model = write_checkpoint(tmp_path / "model", weights, TINY_CONFIG)
    checkpoint = open_checkpoint(open_source(model))
    with pytest.raises(QmixError) as raised:
        quantize_in_child(checkpoint, model, None, "fp16", False, tmp_path / "store", lambda progress: None)
    assert str(raised.value).endswith("has values too large for fp16; use dtype='bf16'")
    assert in_options(raised.value).endswith("has values too large for fp16; use --dtype bf16")


def test_an_error_is_one_printable_line_of_bounded_length() -> None:
    error = QmixError("shard\nname\x1b[31m \ud800 is missing; fetch it")
    assert str(error) == "shard\\nname\\x1b[31m \\ud800 is missing; fetch it"
    long = str(QmixError("a" * 5000 + "; fetch it again"))
    assert len(long) == 1500
    assert long.startswith("aaa")
    assert long.endswith("a; fetch it again")


def test_errors_pass_from_a_worker_to_its_parent():
    """Through pickle, as process pools send them, with their arguments still marked."""
    for error in (DoesNotFitError(f"give {arg('ram', '9GiB')}", 9), UsageError(f"give {arg('context')}")):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), again.message, vars(again)) == (type(error), error.message, vars(error))
