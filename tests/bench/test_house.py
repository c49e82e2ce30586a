"""The counts of benchmarks/house.py, on a toy package that is drawn here and on hand-made imports.

top ──▶ middle ──▶ ground        middle.handed calls back into top
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

pytest.importorskip("grimp")  # it and import-linter come with the extra `dev`
pytest.importorskip("importlinter")

import house

FILES = {
    "__init__.py": "",
    "top.py": "from toyhouse.middle import work\n\ndef run():\n    return work(lambda x: x + 1)\n",
    "middle/__init__.py": "from toyhouse.middle.inner import work\n",
    "middle/inner.py": "from toyhouse import ground\n\ndef work(change):\n    return change(ground.one())\n",
    "middle/alone.py": "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from toyhouse.middle import other\n",
    "middle/other.py": "import toyhouse.middle.alone\n",
    "ground.py": "def one():\n    return 1\n",
}


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "toyhouse" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "toyhouse"
    for name in [name for name in sys.modules if name.partition(".")[0] == "toyhouse"]:
        del sys.modules[name]


def test_rooms_their_imports_and_floors(toy):
    rooms = house.room_imports(house.module_imports(["toyhouse"]), "toyhouse")
    assert rooms == {"top": {"middle"}, "middle": {"ground"}, "ground": set()}
    assert house.floors(rooms) == {"top": 3, "middle": 2, "ground": 1}


def test_a_cycle_through_an_import_for_types_is_found(toy):
    assert house.cycles(house.module_imports(["toyhouse"])) == [["toyhouse.middle.alone", "toyhouse.middle.other"]]


def test_cycles_are_groups_and_have_no_floors():
    imports = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"f"}, "f": {"e", "a"}}
    assert house.cycles(imports) == [["a", "b", "c"], ["e", "f"]]
    with pytest.raises(ValueError, match="import each other"):
        house.floors(imports)


def test_a_walk_has_the_files_entered_and_a_climb_for_the_call_back(toy):
    top = importlib.import_module("toyhouse.top")
    with house.traced(toy) as walk:
        assert top.run() == 2
    assert walk.files == {"top.py", "middle/inner.py", "ground.py"}
    assert walk.rooms == ["ground", "middle", "top"]
    rank = {"ground": 0, "middle": 1, "top": 2}
    assert [(one.partition(":")[0], other.partition(":")[0]) for one, other in walk.climbs(rank)] == [
        ("middle/inner.py", "top.py")
    ]
    assert len(walk.calls) == 3  # run to work, work to one, work to the lambda


def test_lines_are_those_of_all_files(toy):
    assert house.lines([toy / "middle", toy / "ground.py"]) == 1 + 4 + 4 + 1 + 2


def test_the_layers_are_read_lowest_first(tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        '[tool.importlinter]\nroot_package = "toyhouse"\n[[tool.importlinter.contracts]]\nname = "down"\n'
        'type = "layers"\nlayers = ["top", "left | right", "one : two"]\n'
    )
    rank = house.layer_order(tmp_path / "pyproject.toml")
    assert rank == {"one": 0, "two": 0, "left": 1, "right": 1, "top": 2}


def test_the_architecture_page_has_the_layers_of_pyproject():
    page = (house.ROOT / "docs" / "architecture.md").read_text("utf-8")
    rows = re.findall(r"^\| [^|`]+ \| (`.+) \|$", page.partition("## Layers")[2].partition("## ")[0], re.MULTILINE)
    rank = house.layer_order(house.ROOT / "pyproject.toml")
    shown = [room for row in reversed(rows) for room in re.findall(r"`(\w+)`", row)]
    assert sorted(shown) == sorted(rank)
    jobs = {room for room in rank if rank[room] == rank["batch"]}
    assert set(re.findall(r"`(\w+)`", next(row for row in rows if "`batch`" in row))) == jobs
    lowest = [min(rank[room] for room in re.findall(r"`(\w+)`", row)) for row in rows]
    assert lowest == sorted(lowest, reverse=True)
