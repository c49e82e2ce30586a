"""Measure qmix on this machine's GPUs within ten minutes: a table, with predictions, bounds and llama.cpp beside it.

    python benchmarks/gpu.py
    python benchmarks/gpu.py /scratch/qmix-gpu --budget 24GiB --budget 12GiB+12GiB --no-large
    python benchmarks/gpu.py --llama-bench build/bin/llama-bench --peer PEER/bin/python

Writes a synthetic store of 8x7B's size to DIRECTORY, by default ./qmix-gpu (27 GB), and one of 8x22B's where RAM and
disk hold it (29 GB: only 14 layers' experts differ). Runs `qmix doctor`, the self-test, `qmix bench`, a text and 64
prompts together in each budget ("12GiB+12GiB" are two GPUs), one process after the other, while nvidia-smi's memory is
watched. The text is compared with the known continuation, which is also the CPU's. Where there is a llama-bench,
llama.cpp runs the same model in Q4_0 in the same memory; PEER, which writes it, is an environment with gguf and
llama-cpp-python.

Each step has a limit, and its result is saved at once to DIRECTORY/results.json. A step that fails loses nothing else.
What the time limit left, or failed, is run by the same command again; `--again` begins anew. Needs nothing but qmix,
torch for CUDA and the driver.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gpu_llamacpp
from gpu_needs import about, needed, torch_gpus, unmet
from gpu_steps import GIB, NEW, PROMPT, ROOT, TEXT, TOGETHER, Peak, StepError, Steps, gpus, python, run

BUDGETS = ("40GiB", "24GiB", "12GiB")  # for 8x7B
LARGE = 24 * GIB  # for 8x22B
LARGE_RAM = 80 * GIB  # all of its experts that are not on the GPU, and the rest
LARGE_LAYERS = 14  # whose experts differ
DISK = {"8x7b": 28e9, "8x22b": 30e9}  # bytes to write
SECONDS = 570.0  # of a run
MOST = {  # seconds of a step
    "doctor": 150,
    "self-test": 180,
    "store": 240,
    "plan": 60,
    "bench": 150,
    "text": 100,
    "batch": 150,
    "kernels": 150,
    "tests": 300,
}


@dataclass(frozen=True)
class Case:
    """A store in budgets of GPUs, in bytes; without any it is the CPU alone."""

    model: str
    budgets: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.model}, {' + '.join(map(size, self.budgets)) or 'CPU alone'}"

    @property
    def options(self) -> list[str]:
        given = [part for budget in self.budgets for part in ("--gpu", size(budget))]
        return given or ["--gpu", "none"]


def size(nbytes: int) -> str:
    """Return bytes as a size for qmix: in GiB where that is exact, otherwise in MiB."""
    return f"{nbytes // GIB}GiB" if nbytes % GIB == 0 else f"{nbytes // 2**20}MiB"


def parsed(text: str) -> tuple[int, ...]:
    """Return the bytes of a size, or of several joined by "+"."""
    from qmix.units import parse_bytes

    return tuple(parse_bytes(part) for part in text.split("+"))


def cases(wanted: Sequence[str], free: Sequence[int], ram: int, large: bool) -> list[Case]:
    """Return what is run on GPUs with `free` bytes beside `ram` bytes.

    Budgets that the GPUs have not are left out. Without a wish, the first GPU's own size takes the place of those, and
    two GPUs share what two of the smallest budgets hold.
    """
    from qmix.units import parse_bytes

    found = [Case("8x7b", parsed(each)) for each in wanted or BUDGETS]
    found = [case for case in found if fits(case.budgets, free)]
    whole = free[0] // (GIB // 2) * (GIB // 2)
    if not wanted and whole < parse_bytes(BUDGETS[0]) and Case("8x7b", (whole,)) not in found:
        found.insert(0, Case("8x7b", (whole,)))
    both = (parse_bytes(BUDGETS[-1]),) * 2
    if not wanted and fits(both, free):
        found.append(Case("8x7b", both))
    if large and ram >= LARGE_RAM and min(LARGE, whole) >= 0.9 * LARGE:
        found.append(Case("8x22b", (min(LARGE, whole),)))
    return [*found, Case("8x7b", ())]


def fits(budgets: Sequence[int], free: Sequence[int]) -> bool:
    return len(budgets) <= len(free) and all(budget <= most for budget, most in zip(budgets, free, strict=False))


class Machine:
    """This machine, the directory of stores, and the steps of a measurement on it."""

    def __init__(self, directory: Path, steps: Steps, given: argparse.Namespace) -> None:
        self.directory, self.steps, self.given = directory, steps, given
        self.environment = {"XDG_STATE_HOME": str(directory / "state"), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}

    def qmix(self, *arguments: str, limit: float) -> str:
        return python("-m", "cli", *arguments, limit=limit, environment=self.environment)

    def store(self, model: str) -> Path | None:
        """Return the store of a model, written if it is not there; None where it could not be."""
        path = self.directory / model
        made = path.is_dir() or self.steps.take(f"store of {model}", MOST["store"], partial(self._write, model, path))
        return path if made else None

    def _write(self, model: str, path: Path, limit: float) -> bool:
        self.require(DISK[model])
        part = path.with_name(f"{model}.part")
        shutil.rmtree(part, ignore_errors=True)
        python(__file__, "--write", model, str(part), limit=limit, environment=self.environment)
        part.rename(path)
        return True

    def require(self, nbytes: float) -> None:
        """Raise StepError where the disk has less than `nbytes` free."""
        free = shutil.disk_usage(self.directory).free
        if free < nbytes:
            raise StepError(f"{self.directory}: {free / 1e9:.0f} GB free, {nbytes / 1e9:.0f} GB needed")

    def planned(self, case: Case, store: Path, limit: float) -> Any:
        return json.loads(self.qmix("plan", str(store), *case.options, *self.context, "--json", limit=limit))

    @property
    def context(self) -> list[str]:
        return ["--context", str(PROMPT + NEW + 1)]

    def benched(self, case: Case, store: Path, limit: float) -> Any:
        """Return bench's report with nvidia-smi's peaks, in bytes above what was in use before."""
        tests = ["-p", str(PROMPT), "-n", str(NEW), "-r", "2", "--json"]
        with Peak() as peak:
            report = json.loads(self.qmix("bench", str(store), *case.options, *self.context, *tests, limit=limit))
        return {"rows": report["rows"], "ceilings": report["ceilings"], "peak": peak.nbytes if case.budgets else []}

    def text(self, case: Case, store: Path, limit: float) -> Any:
        """Return how many greedy tokens are the known ones."""
        budgets = [part for budget in case.budgets for part in ("--budget", size(budget))]
        out = python(__file__, "--text", str(store), *budgets, limit=limit, environment=self.environment)
        return json.loads(out.strip().splitlines()[-1])

    def batched(self, case: Case, store: Path, limit: float) -> Any:
        """Return the summary of many short prompts answered together."""
        with tempfile.TemporaryDirectory() as scratch:
            asked, answers = Path(scratch) / "in.jsonl", Path(scratch) / "out.jsonl"
            lines = [{"id": str(index), "prompt": f"To print page {index}, click"} for index in range(TOGETHER)]
            asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
            greedy = ["--temperature", "0", "--ignore-eos", "--max-new-tokens", str(NEW), "--json"]
            command = ["batch", str(asked), "-o", str(answers), "-m", str(store), *case.options, *greedy]
            return json.loads(self.qmix(*command, limit=limit))

    def self_tested(self, limit: float) -> Any:
        """Return the lines of the self-test, whether it passes or not."""
        command = [sys.executable, "-m", "cli", "doctor", "--self-test"]
        status, out, err = run(command, limit, self.environment)
        return {"passed": status == 0, "lines": out.strip().splitlines(), "error": "" if status == 0 else err[-2000:]}

    def tests(self, limit: float) -> Any:
        """Return the last lines of the tests that want a GPU, whether they pass or not."""
        where = [str(ROOT / "tests" / name) for name in ("kernels/gpu/test_values.py", "model/test_steps.py")]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-m",
            "gpu",
            "--rootdir",
            str(ROOT),
            *where,
        ]
        status, out, err = run(command, limit, self.environment)
        return {"passed": status == 0, "lines": (out + err).strip().splitlines()[-60:]}

    def kernels(self, limit: float) -> Any:
        script = str(ROOT / "benchmarks/gpu_kernels.py")
        out = python(script, "--model", "8x7b", "--tokens", "1,8,32", limit=limit, environment=self.environment)
        return json.loads(out.strip().splitlines()[-1])


def measure(machine: Machine, wanted: list[Case]) -> None:
    """Take all steps, those first that say most."""
    take, given = machine.steps.take, machine.given
    doctor = ["doctor", "--directory", str(machine.directory), "--json"]
    take("doctor", MOST["doctor"], lambda limit: json.loads(machine.qmix(*doctor, limit=limit)))
    if not given.no_self_test:
        tested = take("self-test", MOST["self-test"], machine.self_tested)
        for line in (tested or {}).get("lines", []):
            machine.steps.say(f"  {line}")
    on_gpu = [case for case in wanted if case.budgets and case.model == "8x7b"]
    others = [case for case in wanted if case not in on_gpu]
    for group in (on_gpu, others):
        for step in ("plan", "bench", "text", "batch"):
            for case in group:
                one(machine, step, case)
        if group is on_gpu:
            gpu_llamacpp.compare(machine, group, MOST["bench"])
    take("kernels", MOST["kernels"], machine.kernels)
    if not given.no_self_test:
        take("tests", MOST["tests"], machine.tests)


def one(machine: Machine, step: str, case: Case) -> None:
    """Take one step of a case."""
    works = {"plan": machine.planned, "bench": machine.benched, "text": machine.text, "batch": machine.batched}
    if step == "batch" and not case.budgets:
        return
    store = machine.store(case.model)
    if store is not None:
        machine.steps.take(f"{step} of {case.name}", MOST[step], partial(works[step], case, store))


def text(store: Path, budgets: Sequence[str]) -> dict[str, Any]:
    """Return how many greedy tokens are the known ones, of those of a prompt."""
    from synthetic_weights import SyntheticModel

    import qmix

    model = SyntheticModel.of(store)
    ids = model.prompt(700, PROMPT)
    with qmix.load(store, gpu=list(budgets), context=PROMPT + TEXT + 1) as runner:
        found = runner.complete(ids, temperature=0, max_new_tokens=TEXT, ignore_eos=True).token_ids
    want = model.continuation(ids, TEXT)
    return {"right": sum(one == other for one, other in zip(found, want, strict=True))}


def write(model: str, directory: Path) -> None:
    """Write the synthetic store of a model."""
    from synthetic_store import write_store
    from synthetic_weights import PRESETS, SyntheticModel

    write_store(directory, SyntheticModel(PRESETS[model], 0, LARGE_LAYERS if model == "8x22b" else 0))


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, nargs="?", default=Path("qmix-gpu"))
    parser.add_argument("--budget", action="append", default=[], metavar="SIZE", help="of the GPU, or of several: A+B")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which no step is begun")
    parser.add_argument("--no-large", action="store_true", help="leave 8x22B out")
    parser.add_argument("--no-self-test", action="store_true", help="leave the self-test and the tests out")
    parser.add_argument("--again", action="store_true", help="keep no result of a run before")
    parser.add_argument("--llama-bench", type=Path, metavar="PROGRAM", help="llama.cpp's [the one on the PATH]")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="8x7B for it [DIRECTORY/8x7b.gguf]")
    parser.add_argument("--peer", type=Path, metavar="PYTHON", help="with gguf and llama-cpp-python, to write it")
    parser.add_argument("--text", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--write", metavar="MODEL", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> int:
    """Take the steps that are not done yet, then print what all runs found, and one JSON line."""
    given = options()
    directory = given.directory.absolute()
    if given.text:
        print(json.dumps(text(directory, given.budget)))
        return 0
    if given.write:
        write(given.write, directory)
        return 0
    return measured(given, directory)


def measured(given: argparse.Namespace, directory: Path) -> int:
    found = [gpu for gpu in gpus() if gpu["free"]]
    if not found:
        print("Error: needs an NVIDIA GPU with its driver, and torch for CUDA; there is none here", file=sys.stderr)
        return 1
    missing, others = unmet(needed())
    if missing:
        print(f"Error: not installed: {', '.join(missing)}; see pyproject.toml", file=sys.stderr)
        return 1
    import psutil

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    for each in others:
        say(f"not a version that qmix is tested with: {each}")
    if (count := torch_gpus()) < len(found):
        say(f"torch finds {count} of {len(found)} GPUs: is it a build for CUDA, and the driver new enough for it?")
    directory.mkdir(parents=True, exist_ok=True)
    if given.again:
        (directory / "results.json").unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    steps = Steps(directory / "results.json", about(found), given.seconds, say)
    wanted = cases(given.budget, [gpu["free"] for gpu in found], psutil.virtual_memory().total, not given.no_large)
    try:
        measure(Machine(directory, steps, given), wanted)
    finally:  # also where the run is ended from outside
        steps.save()
        from gpu_report import report

        report(steps, wanted)
        print(f"{', '.join(gpu['name'] for gpu in found)}; {time.strftime('%Y-%m-%d')}; saved in {steps.path}")
        print(json.dumps({"about": steps.about, "results": steps.results, "errors": steps.errors}))
    return 1 if steps.errors else 0


if __name__ == "__main__":
    sys.exit(main())
