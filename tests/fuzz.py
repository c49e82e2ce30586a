"""Feed every parser of qmix with inputs that nobody meant: it must take or refuse each, and go on.

    python tests/fuzz.py --runs 100000              # minutes; exit code 1 where something failed
    python tests/fuzz.py --replay fuzz-failures/plan.json@17

A failure is an exception that is no QmixError, a refusal of more than one line or of more than 2000 characters, more
than five seconds or a gigabyte for one input, or the end of the process. Inputs that failed are written to
`--failures`; they follow from `--seed`.
"""

from __future__ import annotations

import gc
import os
import random
import resource
import signal
import sys
import tempfile
import traceback
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click
import msgspec
from fuzz_mutations import mutated, thought_of
from fuzz_parsers import Parser, all_parsers
from rich.console import Console
from rich.table import Table

from qmix.errors import QmixError
from qmix.files import decode_json

BYTES = 10**9  # of memory that one input may take
LONGEST = 2000  # characters of a refusal
THOUGHT_OF = 0.1  # of the inputs: hypothesis' own


class Hang(BaseException):
    """No handler of the parser's takes it for something else."""


class Tally(msgspec.Struct):
    """The results of a parser's inputs; `failures` are the input's number, what happened, and the input in hex."""

    accepted: int = 0
    refused: int = 0
    failures: list[tuple[int, str, str]] = []


@dataclass
class Trial:
    """One parser with its inputs, in the process that calls it."""

    parser: Parser
    tally: Tally = field(default_factory=Tally)

    def one(self, number: int, data: bytes) -> None:
        peak, failure = peak_memory(), None
        signal.setitimer(signal.ITIMER_REAL, self.parser.seconds)
        try:
            self.parser.parse(data)
        except QmixError as refusal:
            told = str(refusal)
            if len(told.splitlines()) != 1 or len(told) > LONGEST:
                failure = f"a refusal of {len(told.splitlines())} lines and {len(told)} characters: {told[:200]!r}"
            else:
                self.tally.refused += 1
        except Hang:
            failure = f"more than {self.parser.seconds:g} s"
        except Exception as error:
            failure = f"{type(error).__name__}: {str(error)[:200]}"
        else:
            self.tally.accepted += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if peak_memory() - peak > BYTES:
            failure = f"{(peak_memory() - peak) / 1e9:.1f} GB of memory"
        if failure:
            self.tally.failures.append((number, failure, data.hex()))


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _hang(*signal_and_frame: object) -> None:
    raise Hang


def inputs(parser: Parser, count: int, seed: int) -> Iterator[bytes]:
    """The documents themselves, hypothesis' inputs, then changed documents."""
    yield from parser.documents[:count]
    count = max(0, count - len(parser.documents))
    name = f"{seed}:{parser.name}"
    own = thought_of(int(count * THOUGHT_OF), zlib.crc32(name.encode()))
    yield from own
    for number in range(count - len(own)):
        yield mutated(random.Random(f"{name}:{number}"), parser.documents, parser.form)


def tried(parser: Parser, count: int, seed: int, room: Path) -> Tally:
    """Feed a parser in a process of its own, which may end without ending this one."""
    note, result = room / "input", room / "result"
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _feed(Trial(parser), inputs(parser, count, seed), note, result)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    tally = decode_json(result.read_bytes(), Tally, parser.name, QmixError) if ended == 0 else Tally()
    if ended:
        tally.failures.append((-1, f"the process ended with {ended}", note.read_bytes().hex()))
    return tally


def _feed(trial: Trial, fed: Iterator[bytes], note: Path, result: Path) -> None:
    gc.freeze()  # or the first collection would copy every page
    signal.signal(signal.SIGALRM, _hang)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * BYTES, resource.RLIM_INFINITY))
    for number, data in enumerate(fed):
        note.write_bytes(data)
        trial.one(number, data)
    result.write_bytes(msgspec.json.encode(trial.tally))


def shares(parsers: list[Parser], runs: int) -> dict[str, int]:
    """Return the number of inputs of each parser: `runs` in all, none without any."""
    whole = sum(parser.weight for parser in parsers)
    found = {parser.name: max(len(parser.documents), int(runs * parser.weight / whole)) for parser in parsers}
    found[parsers[0].name] += max(0, runs - sum(found.values()))
    return found


def show(tallies: dict[str, Tally]) -> None:
    table = Table(title="inputs fed to each parser")
    for name in ("parser", "inputs", "refused", "accepted", "failures"):
        table.add_column(name, justify="left" if name == "parser" else "right")
    for name, tally in (*tallies.items(), ("all", total(tallies))):
        count = tally.accepted + tally.refused + len(tally.failures)
        table.add_row(name, *map(str, (count, tally.refused, tally.accepted, len(tally.failures))))
    Console(width=120).print(table)


def total(tallies: dict[str, Tally]) -> Tally:
    every = tallies.values()
    failures = [failure for tally in every for failure in tally.failures]
    return Tally(sum(tally.accepted for tally in every), sum(tally.refused for tally in every), failures)


def keep(directory: Path, tallies: dict[str, Tally]) -> None:
    """Write inputs that failed; of the same failure of a parser only the first few."""
    for name, tally in tallies.items():
        seen: dict[str, int] = {}
        for number, why, data in tally.failures:
            kind = why[:60]
            seen[kind] = seen.get(kind, 0) + 1
            if seen[kind] > 3:
                continue
            directory.mkdir(parents=True, exist_ok=True)
            path = directory / f"{name.replace('/', '-').replace(' ', '-')}@{number}"
            path.write_bytes(bytes.fromhex(data))
            print(f"{name}: {why}\n    {path}")


@click.command()
@click.option("--runs", default=100_000, show_default=True, help="inputs in all")
@click.option("--seed", default=0, show_default=True)
@click.option("--only", multiple=True, metavar="NAME", help="of the parsers; may be given again")
@click.option("--failures", type=click.Path(path_type=Path), default=Path("fuzz-failures"), show_default=True)
@click.option("--replay", type=click.Path(path_type=Path, exists=True), help="an input that failed, once more")
def main(runs: int, seed: int, only: tuple[str, ...], failures: Path, replay: Path | None) -> None:
    """Print a table of what each parser took and refused, and where it failed."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as place:
        parsers = [each for each in all_parsers(Path(place)) if not only or each.name in only]
        if replay is not None:
            name = replay.name.partition("@")[0]
            again = next(each for each in parsers if each.name.replace("/", "-").replace(" ", "-") == name)
            print(again.parse(replay.read_bytes()))
            return
        counts = shares(parsers, runs)
        tallies = {each.name: tried(each, counts[each.name], seed, Path(place)) for each in parsers}
    show(tallies)
    keep(failures, tallies)
    sys.exit(bool(total(tallies).failures))


if __name__ == "__main__":
    main()
