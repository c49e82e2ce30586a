"""Every figure of the README is in one register, docs/figures.json, with what gave it; those that can be are worked out
again, and what the README shows of commands is what they say."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qmix.checkpoint import open_checkpoint
from qmix.checkpoint.source import LocalSource
from qmix.commands.plan import plan as plan_command
from qmix.models.published import PUBLISHED
from qmix.plan import make_plan
from qmix.precision.record import record_layout
from qmix.store.layout import StoreLayout, parse_precisions
from qmix.units import format_bytes

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
RELIABILITY = (ROOT / "docs" / "reliability.md").read_text("utf-8")
FIGURES: list[dict[str, Any]] = json.loads((ROOT / "docs" / "figures.json").read_text("utf-8"))["figures"]
BLOCK = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
UNITS = r"%|times|nats|tok/s|[kMGT]i?B|GFLOP|ms|seconds|minutes|million"
FIGURE = re.compile(rf"(?<![\w.,])\d[\d.,]*(?:\s*(?:and|to|or|,)\s*\d[\d.,]*)*\s?(?:{UNITS})(?!\w)")
NAMES = re.compile(r"\b8x(?:7|22)B\b|\b[48]-bit|`[^`\n]*`|\]\([^)]*\)|\w+-\d+\b")
MADE = r"[\d.]+ s\b|[\d.]+ tok/s|peak \d+ Mi?B|seed \d+|[\d.]+ Mi?B/s"  # of a run: time, memory, chance


def prose() -> str:
    """The README without blocks of code, names that hold digits, and line breaks inside paragraphs."""
    return re.sub(r"(?<=\S)\n(?=[^\n|#>-])", " ", NAMES.sub(" ", BLOCK.sub("", README)))


def reduced(text: str) -> str:
    """As `prose` has it."""
    return re.sub(r"\s+", " ", NAMES.sub(" ", text)).strip()


def test_every_figure_of_the_register_is_in_the_readme_once():
    text = re.sub(r"\s+", " ", BLOCK.sub("", README))
    for figure in FIGURES:
        assert text.count(figure["text"]) == 1, figure


def uncovered() -> tuple[list[str], list[str]]:
    """Figures of the text, and value cells of tables with digits, that no entry of the register covers."""
    text = re.sub(r"[ \t]+", " ", prose())
    for figure in sorted(FIGURES, key=lambda each: -len(each["text"])):
        text = text.replace(reduced(figure["text"]), "")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    cells = [cell for row in rows for cell in row.strip("| ").split("|")[1:] if re.search(r"\d", cell)]
    return FIGURE.findall(text), cells


def test_every_figure_of_the_readme_is_in_the_register():
    assert uncovered() == ([], [])


@pytest.mark.parametrize("lost", FIGURES, ids=lambda figure: figure["id"])
def test_a_figure_that_the_register_lacks_is_noticed(lost, monkeypatch):
    monkeypatch.setattr("test_figures.FIGURES", [figure for figure in FIGURES if figure is not lost])
    assert uncovered() != ([], [])


def test_the_register_says_what_gave_each_figure():
    assert len({figure["id"] for figure in FIGURES}) == len(FIGURES)
    for figure in FIGURES:
        if figure["kind"] == "measured":
            assert figure.keys() == {"id", "text", "what", "kind", "command", "date", "machine"}
            assert re.fullmatch(r"20\d\d-\d\d-\d\d( and 20\d\d-\d\d-\d\d)?", figure["date"]), figure
            for script in re.findall(r"\bbenchmarks/\w+\.py", figure["command"]):
                assert (ROOT / script).is_file(), figure
            assert re.match(r"qmix |benchmarks/", figure["command"]), figure
        else:
            assert figure.keys() == {"id", "text", "what", "kind", "source"}
            assert figure["kind"] in ("computed", "stated")
            assert exists(figure["source"]), figure


def exists(place: str) -> bool:
    """A file of the repository, or path::name of a test in one."""
    path, _, name = place.partition("::")
    if not (ROOT / path).is_file():
        return False
    return not name or name in {node.name for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8")))
                                if isinstance(node, ast.FunctionDef)}  # fmt: skip


def test_every_test_that_a_promise_rests_on_is_there():
    rows = [line for line in RELIABILITY.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 30
    for row in rows:
        _, _, tries, counted, _ = row.split("|")
        places = re.findall(r"`(tests/[^`]+)`", tries)
        assert places, row
        assert all(map(exists, places)), row
        assert re.search(r"\d|every|each", counted), row


# worked out again


def gib(nbytes: int) -> str:
    """Rounded up: a budget that is rounded down is refused."""
    tenths = -(-10 * nbytes // 2**30)
    return f"{-(-tenths // 10)} GiB" if tenths >= 1000 else f"{tenths / 10:.1f} GiB"


@pytest.mark.parametrize("precision", ["nf4", "int8"])
@pytest.mark.parametrize("model", ["8x7B", "8x22B"])
def test_sizes_of_published_models_are_those_of_the_layout(model, precision):
    geometry = PUBLISHED[f"mixtral-{model.lower()}"].geometry
    layout = StoreLayout(geometry, parse_precisions(precision, geometry), "bf16")
    plan = make_plan(layout, 2**40, 4096, 500 * 10**6)
    expert = record_layout(geometry, precision, "bf16").nbytes
    sizes = (format_bytes(layout.total_bytes), format_bytes(expert), gib(plan.smallest), gib(plan.roomy))
    assert f"| {model} {precision} | {' | '.join(sizes)} |\n" in README


def test_the_embedded_model_has_the_stated_number_of_parameters(tiny):
    weights = open_checkpoint(LocalSource(tiny)).weights.values()
    assert round(sum(weight.rows * weight.cols for weight in weights) / 1e6) == 15


def test_the_machines_that_are_compared_are_those_of_the_command(monkeypatch):
    """Python takes what it takes in the table of sizes, so that the plan is the same everywhere."""
    monkeypatch.setattr("qmix.plan.here.interpreter_memory", lambda **options: 500 * 10**6)
    shown = next(block for block in BLOCK.findall(README) if block.startswith("$ qmix plan"))
    command, _, table = shown.partition("\n")
    done = CliRunner().invoke(plan_command, command.removeprefix("$ qmix plan ").split(), env={"COLUMNS": "120"})
    assert done.exit_code == 0
    assert [line.rstrip() for line in done.output.splitlines()] == table.splitlines()


# what commands say


def masked(text: str) -> list[str]:
    """Return the lines that every use says, their figures left out: what a first use says depends on those before."""
    first_use = ("quantizing ", "measuring the memory of Python")
    return [re.sub(MADE, "…", line) for line in text.splitlines() if not line.startswith(first_use)]


def block_with(start: str) -> str:
    return next(block for block in BLOCK.findall(README) if start in block)


def test_the_first_command_says_what_the_readme_shows(qmix):
    done = qmix("generate", "Click the button to", "--temperature", "0", "--ram", "1GiB")
    notice, *rest = masked(block_with("no model given"))  # what a first use says: see test_cli.py
    assert masked(done.err) == [notice, rest[-1]]
    assert masked(done.out) == rest[:-1]


def test_the_chat_says_what_the_readme_shows(qmix):
    shown = block_with("| qmix chat tiny").partition("\n")[2]
    options = ("--ram", "1GiB", "--temperature", "0", "--max-new-tokens", "40")
    done = qmix("chat", "tiny", *options, stdin=b"How do I print a page?\nAnd on both sides?\n")
    assert masked(done.out) == masked(shown)[::2]
    assert masked(done.err) == masked(shown)[1::2]


def test_the_batch_says_what_the_readme_shows(qmix, tmp_path):
    typed, _, shown = block_with("$ qmix batch").partition("p.jsonl\n")
    requests = re.findall(r"\{.*?\}", typed)
    (tmp_path / "p.jsonl").write_text("".join(f"{line}\n" for line in requests))
    options = ("-m", "tiny", "--ram", "1GiB", "--temperature", "0", "--max-new-tokens", "20")
    done = qmix("batch", tmp_path / "p.jsonl", "-o", tmp_path / "a.jsonl", *options)
    assert (done.status, len(requests)) == (0, 2)
    assert masked(done.err)[-1:] == masked(shown)[-1:]
