"""Measure the arrangement of the code: rooms, floors, import arrows, cycles, and the walk of a call through them.

    python benchmarks/house.py

A *room* is a package or module directly in `qmix`, or `calibration`. A room's *floor* is the length of the longest
chain of imports that starts in it. Imports under TYPE_CHECKING count as any other. The walks are traced on the embedded
model: `qmix.load`, then one token. A *climb* is a call from a room into one that the layers of pyproject.toml put above
it, counted once for each pair of functions. Code that runs on import is not traced. Prints a table, then one JSON line.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType

import click
import grimp
from importlinter import api
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
PACKAGES = ("qmix", "calibration")
DATA = ROOT / "qmix" / "models" / "tiny"  # the embedded model and its recipe, which nothing imports

Imports = dict[str, set[str]]  # by module or room
Call = tuple[str, str]  # caller and called function, each as "path:name"


def module_imports(packages: Iterable[str]) -> Imports:
    """Return what each module of some packages imports of them."""
    first, *others = packages
    graph = grimp.build_graph(first, *others, cache_dir=None)
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def room_imports(modules: Imports, package: str) -> Imports:
    """Return what each room imports: the modules directly in `package` are rooms, and the other packages whole.

    The package's own `__init__`, a door to the rooms, is left out.
    """

    def room(module: str) -> str:
        top, _, rest = module.partition(".")
        return rest.partition(".")[0] if top == package else top

    rooms: Imports = {room(module): set() for module in modules if module != package}
    for module in modules.keys() - {package}:
        rooms[room(module)] |= {room(below) for below in modules[module] if below != package} - {room(module)}
    return rooms


def cycles(imports: Imports) -> list[list[str]]:
    """Return the groups of modules that import each other, directly or through others."""
    below: Imports = {}
    for module in imports:
        waiting = set(imports[module])
        below[module] = set()
        while waiting:
            below[module].add(found := waiting.pop())
            waiting |= imports[found] - below[module]
    groups = {frozenset(other for other in below[module] if module in below[other]) for module in imports}
    return sorted(sorted(group) for group in groups if group)


def floors(imports: Imports) -> dict[str, int]:
    """Return each room's floor. Raises ValueError if rooms import each other."""
    if found := cycles(imports):
        raise ValueError(f"no floors, these import each other: {found}")

    @cache
    def floor(room: str) -> int:
        return 1 + max(map(floor, imports[room]), default=0)

    return {room: floor(room) for room in imports}


def lines(paths: Iterable[Path]) -> int:
    """Return the number of lines of all Python files at or below some paths."""
    files = [file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])]
    return sum(len(file.read_bytes().splitlines()) for file in files if DATA not in file.parents)


def layer_order(config: Path) -> dict[str, int]:
    """Return the rank of each room in the first contract of an import-linter configuration, 0 for the lowest."""
    layers = api.read_configuration(str(config))["contracts_options"][0]["layers"]
    names = [[name.strip() for name in layer.replace("|", ":").split(":")] for layer in reversed(layers)]
    return {name: rank for rank, layer in enumerate(names) for name in layer}


@dataclass
class Walk:
    """Files of a package that a call enters, and the calls between its functions."""

    package: Path
    files: set[str] = field(default_factory=set)
    calls: set[Call] = field(default_factory=set)

    @property
    def rooms(self) -> list[str]:
        return sorted({room_of(file) for file in self.files} - {"__init__"})

    def climbs(self, rank: Mapping[str, int]) -> list[Call]:
        """Return the calls into a room of higher rank."""
        return sorted(
            (caller, called)
            for caller, called in self.calls
            if rank.get(room_of(caller), -1) < rank.get(room_of(called), -1)
        )

    def _note(self, frame: FrameType, event: str, _: object) -> None:
        if event != "call" or (called := self._function(frame)) is None:
            return
        self.files.add(called.partition(":")[0])
        above = frame.f_back
        while above is not None and (caller := self._function(above)) is None:
            above = above.f_back  # torch or transformers lie between
        if above is not None:
            assert caller is not None
            self.calls.add((caller, called))

    def _function(self, frame: FrameType) -> str | None:
        """Return "path:name" of a frame's function; None outside the package and for a module's top level."""
        code, within = frame.f_code, f"{self.package}{os.sep}"
        if not code.co_filename.startswith(within) or code.co_name == "<module>":
            return None
        return f"{code.co_filename.removeprefix(within)}:{getattr(code, 'co_qualname', code.co_name)}"


def room_of(place: str) -> str:
    """Return the room of a path within the package, with or without a function's name: "pool/slots.py" to "pool"."""
    return place.partition(":")[0].partition(os.sep)[0].removesuffix(".py")


@contextmanager
def traced(package: Path) -> Iterator[Walk]:
    """Trace the calls of this thread and of threads started within the block."""
    walk = Walk(package)
    threading.setprofile(walk._note)
    sys.setprofile(walk._note)
    try:
        yield walk
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def walks() -> tuple[Walk, Walk]:
    """Return the walks of loading the embedded model and of its first token, both for the second time in a process."""
    import qmix

    package = Path(qmix.__file__).parent
    with qmix.load("tiny", ram="1GiB", context=256) as runner:
        runner.complete("To print a page,", max_new_tokens=1, temperature=0)
    with traced(package) as loading:
        runner = qmix.load("tiny", ram="1GiB", context=256)
    with runner, traced(package) as token:
        for _ in runner.generate("To print a page,", max_new_tokens=1, temperature=0):
            pass
    return loading, token


@click.command()
@click.option("--details", is_flag=True, help="also list floors, cycles, climbs, and the files up to the token")
def main(details: bool) -> None:
    """Print a table, then one JSON line."""
    modules, rank = module_imports(PACKAGES), layer_order(ROOT / "pyproject.toml")
    rooms, (loading, token) = room_imports(modules, PACKAGES[0]), walks()
    floor_of = floors(rooms)
    figures = {
        "rooms": len(rooms),
        "floors": max(floor_of.values()),
        "arrows between rooms": sum(map(len, rooms.values())),
        "cycles between rooms": len(cycles(rooms)),
        "cycles between modules": len(cycles(modules)),
        "rooms that load enters": len(loading.rooms),
        "the same, flat modules left out": len([room for room in loading.rooms if (ROOT / "qmix" / room).is_dir()]),
        "climbs of load": len(loading.climbs(rank)),
        "files from prompt to token": len(token.files),
        "rooms from prompt to token": len(token.rooms),
        "climbs from prompt to token": len(token.climbs(rank)),
        "modules flat in qmix/": len([path for path in (ROOT / "qmix").glob("*.py") if path.name != "__init__.py"]),
        "lines of product code": lines([*(ROOT / name for name in PACKAGES), ROOT / "cli.py"]),
    }
    table = Table("figure", "value", title="the arrangement of the code")
    for name, value in figures.items():
        table.add_row(name, f"{value:,}")
    Console().print(table)
    if details:
        for number in range(max(floor_of.values()), 0, -1):
            print(f"floor {number}:", *sorted(room for room in rooms if floor_of[room] == number))
        for group in cycles(modules):
            print("cycle:", *group)
        for name, walk in (("load", loading), ("token", token)):
            print(f"{name}, rooms:", *walk.rooms)
            print(f"{name}, files:", *sorted(walk.files))
            for caller, called in walk.climbs(rank):
                print(f"{name}, climb: {caller} -> {called}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
