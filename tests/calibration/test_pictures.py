"""A calibration on a terminal, to the character, and in files."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from calibration.plot import draw
from calibration.tables import (
    UseMap,
    distance,
    error_table,
    hit_table,
    language_table,
    shares,
    unit_of,
    viridis,
)
from qmix.errors import QmixError, UsageError
from qmix.pool.replay import Curve, Replay
from qmix.terminal.figure import check_target

USE = [[4, 4, 0, 8], [4, 4, 4, 4]]
BY_LANGUAGE = {"en": [[2, 2, 0, 4], [2, 2, 2, 2]], "de": [[2, 2, 0, 4], [0, 0, 0, 8]]}
REPLAY = Replay(
    100,
    8,
    (
        Curve("lru", (2, 4, 8), (0, 50, 90)),
        Curve("lfu", (2, 4, 8), (20, 40, 90)),
        Curve("uses-per-time", (2, 4, 8), (25, 60, 90)),
        Curve("static", (2, 4, 8), (10, 30, 90)),
        Curve("belady", (2, 4, 8), (50, 75, 90)),
    ),
)
GIB = 2**30
FRONTIER = [(4 * GIB, 0.1), (8 * GIB, 0.001), (16 * GIB, 0.0)]
UNIFORM = {"nf4": (4 * GIB, 0.1), "int8": (8 * GIB, 0.002), "half": (16 * GIB, 0.0)}
CHOSEN = (6 * GIB, 0.01)


def shown(*things, width: int = 60, colour: bool = False) -> list[str]:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=colour, color_system="truecolor" if colour else None
    )
    for thing in things:
        console.print(thing)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_the_map_of_use_without_colours():
    assert shown(UseMap(USE)) == [
        "Use of experts: % of a layer's requests, 25 by chance",
        "layer   0     1     2     3",
        "    0 ▒▒ 25 ▒▒ 25     0 ██ 50",
        "    1 ▒▒ 25 ▒▒ 25 ▒▒ 25 ▒▒ 25",
        "      0.0%    ░░░▒▒▒▓▓▓███ 50.0%",
    ]


def test_the_map_of_use_in_colours():
    line = shown(UseMap(USE), colour=True)[2]
    cells = re.findall(r"\x1b\[38;2;([\d;]+);48;2;([\d;]+)m *(\d+) *\x1b", line)
    assert cells == [
        ("255;255;255", "33;145;140", "25"),  # the middle of viridis
        ("255;255;255", "33;145;140", "25"),
        ("255;255;255", "68;1;84", "0"),
        ("0;0;0", "253;231;37", "50"),
    ]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_pictures_of_a_large_model_keep_to_the_terminals_width(width):
    use = [[layer + expert + 1 for expert in range(8)] for layer in range(56)]
    lines = shown(UseMap(use), hit_table(REPLAY), error_table(FRONTIER, UNIFORM), width=width)
    assert max(map(len, lines)) <= width
    assert sum(line.lstrip().startswith(("55 ", "0 ")) for line in lines[:60]) == 2


def test_many_experts_get_narrow_cells():
    found = shown(UseMap([[2] * 30 + [1, 3]]))
    assert found[1:3] == ["layer 0    5    10   15   20   25   30", "    0 " + "▒" * 30 + " █"]


def test_languages_beside_all_text():
    lines = shown(language_table(USE, BY_LANGUAGE), width=80)
    assert lines[0] == "Languages beside all text"
    # of layer 1, 3 of 4 equal parts would have to go to expert 3; of layer 0, none
    assert [line.split() for line in lines[3:5]] == [
        ["en", "0.0%", "0", "(0.0%)", "0.0", "25.0%", "25.0%"],
        ["de", "37.5%", "1", "(75.0%)", "1.3", "100.0%", "25.0%"],
    ]


def test_hit_rates_by_pool_size():
    lines = shown(hit_table(REPLAY), width=80)
    assert lines[0] == "Hit rate by pool size"
    assert lines[-1] == "* best policy of a run; over all sizes: decayed use"
    table = {line.split()[0]: line.split() for line in lines if line.strip()}
    assert table["2"] == ["2", "25%", "0.0%", "20.0%", "25.0%", "*", "10.0%", "50.0%"]
    assert table["4"] == ["4", "50%", "50.0%", "40.0%", "60.0%", "*", "30.0%", "75.0%"]


def test_error_against_bytes():
    uniform = {**UNIFORM, "nf4/256": (3 * GIB, 0.2)}  # smaller than any mixture
    assert shown(error_table(FRONTIER, uniform, CHOSEN)) == [
        "Error against bytes of experts",
        "experts   GiB   error   best mixture",
        "─" * 36,
        "nf4/256     3     0.2",
        "nf4         4     0.1            0.1",
        "chosen      6    0.01            0.1",
        "int8        8   0.002          0.001",
        "half       16       0              0",
    ]


def test_scales():
    assert [unit_of(size)[1] for size in (5, 2**20, 3 * GIB)] == ["B", "MiB", "GiB"]
    assert viridis(0) == (0x44, 0x01, 0x54)
    assert viridis(1) == (0xFD, 0xE7, 0x25)
    assert shares([[1, 3], [0, 0]]) == [[0.25, 0.75], [0, 0]]
    assert distance([1, 0], [0, 1]) == 1


def test_one_picture_of_everything(tmp_path):
    path = tmp_path / "calibration.svg"
    draw(path, "tiny", USE, REPLAY, FRONTIER, UNIFORM, CHOSEN, BY_LANGUAGE)
    svg = path.read_text(encoding="utf-8")
    words = set(re.findall(r"<text[^>]*>([^<]+)</text>", svg))
    assert words >= {"layer", "expert", "en", "de", "bytes of all experts, GiB", "nf4", "int8", "half", "chosen"}
    assert words >= {"Hit rate by pool size; best policy: decayed use", "experts in memory, of 8", "best possible"}
    assert words >= {"error, logarithmic down to 0.001", "0.1", "0.01", "0.001", "0"}
    assert any("which experts are used" in word for word in words)


def test_a_picture_without_languages_or_a_choice(tmp_path):
    path = tmp_path / "calibration.png"
    draw(path, "tiny", USE, REPLAY, FRONTIER, UNIFORM)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(QmixError, match="choose another path for plot"):
        draw(tmp_path / "none" / "calibration.png", "tiny", USE, REPLAY, FRONTIER, UNIFORM)


def test_a_name_that_is_no_pictures_is_refused():
    with pytest.raises(UsageError, match=r"write it like calibration\.png or calibration\.svg"):
        check_target(Path("calibration.pdf"), "calibration")
    assert check_target(Path("calibration.SVG"), "calibration") == Path("calibration.SVG")
