"""Steps of a measurement that are worth keeping one by one: each is saved at its end, and none loses the others.

A step has a limit in seconds and its own processes, which end with it. A step that failed or was not begun is tried
again by the next run in the same directory; one that succeeded is not. Standard library and psutil only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
PROMPT, NEW, TEXT = 512, 64, 48  # tokens
TOGETHER = 64  # prompts of a batch
LEAST_SECONDS = 10.0  # a step is not begun with less
QUERY = "--query-gpu=name,memory.total,memory.free,memory.used,driver_version,compute_cap"
WATCH_MILLISECONDS = 200

if str(ROOT) not in sys.path:  # qmix may be there without being installed
    sys.path.insert(0, str(ROOT))


class StepError(Exception):
    """Why a step has no result, in a line."""


def run(command: Sequence[str], limit: float, environment: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    """Return a command's status, stdout and stderr. Raises StepError where it does not end within `limit` seconds.

    Its whole family is killed then, and where this program is interrupted.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    given = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | dict(environment or {})
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=given) as child:
        try:
            out, err = child.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            kill_family(child.pid)
            out, err = child.communicate()
            raise StepError(f"not done after {limit:.0f} s; it had printed: {last_line(err, out)}") from None
        except BaseException:
            kill_family(child.pid)
            raise
    return child.returncode, out, err


def kill_family(pid: int) -> None:
    """Kill a process and all that it started."""
    import psutil

    try:
        parent = psutil.Process(pid)
        family = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def last_line(*texts: str) -> str:
    """Return the last line of the first text that has one."""
    for text in texts:
        lines = [line for line in text.strip().splitlines() if line.strip()]
        if lines:
            return lines[-1].strip()[:300]
    return "nothing"


def python(*arguments: str, limit: float, environment: Mapping[str, str] | None = None) -> str:
    """Return the stdout of this Python with some arguments. Raises StepError with its last line where it fails."""
    status, out, err = run([sys.executable, *arguments], limit, environment)
    if status:
        raise StepError(f"{' '.join(arguments)}: status {status}: {last_line(err, out)}")
    return out


class Steps:
    """Results by the name of their step, in a file that is written after every step."""

    def __init__(self, path: Path, about: Mapping[str, Any], seconds: float, say: Callable[[str], None]) -> None:
        """Go on with the results in `path` if they are `about` the same machine and versions."""
        self.path, self.about, self.say = path, dict(about), say
        self.until = time.monotonic() + seconds
        self.results: dict[str, Any] = {}
        self.errors: dict[str, str] = {}
        self.left: list[str] = []
        before = self._before()
        if before is not None and before.get("about") == self.about:
            self.results = before["results"]
        elif before is not None:
            path.rename(path.with_name(f"results-{time.strftime('%Y%m%d-%H%M%S')}.json"))

    def _before(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and isinstance(found.get("results"), dict) else None

    def take(self, name: str, limit: float, work: Callable[[float], Any]) -> Any:
        """Return the result of a step, kept or made now; None where there is none.

        `work` gets the seconds that it may take: `limit`, or what is left of the whole.
        """
        if name in self.results or name in self.errors or name in self.left:
            return self.results.get(name)
        left = self.until - time.monotonic()
        if left < LEAST_SECONDS:
            self.left.append(name)
            return None
        started = time.monotonic()
        self.say(f"{name} ...")
        try:
            self.results[name] = work(min(limit, left))
        except Exception as error:  # whatever it is, the other steps are worth having
            self.errors[name] = str(error) or type(error).__name__
            self.say(f"{name}: failed: {self.errors[name]}")
        else:
            self.say(f"{name}: {time.monotonic() - started:.0f} s")
        self.save()
        return self.results.get(name)

    def save(self) -> None:
        """Write all results in one step."""
        content = {"about": self.about, "results": self.results, "errors": self.errors, "left": self.left}
        scratch = self.path.with_name(f"{self.path.name}.part")
        scratch.write_text(json.dumps(content, indent=1))
        scratch.replace(self.path)


def smi(*arguments: str) -> list[list[str]]:
    """Return the rows of nvidia-smi's table, one for each GPU; empty where it does not answer."""
    command = ["nvidia-smi", *arguments, "--format=csv,noheader,nounits"]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    command += [f"--id={chosen}"] if chosen else []
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


def gpus() -> list[dict[str, Any]]:
    """Return the GPUs that nvidia-smi names, with bytes of memory; no context of CUDA is made for that."""
    names = ("name", "total", "free", "used", "driver", "capability")
    found = []
    for row in smi(QUERY):
        each: dict[str, Any] = dict(zip(names, row, strict=False))
        found.append(each | {size: mebibytes(each.get(size, "")) for size in ("total", "free", "used")})
    return found


def mebibytes(cell: str) -> int | None:
    """Return the bytes of a number of MiB; None for what is not one, as "[N/A]"."""
    return int(cell) * 2**20 if cell.isdecimal() else None


def place_of(index: str, uuid: Sequence[str], chosen: str | None) -> int | None:
    """Return the place of a GPU among the `chosen` ones, a list of indices or UUIDs; None if it is none of them."""
    if not chosen:
        return int(index) if index.isdecimal() else None
    names = [name.strip() for name in chosen.split(",")]
    return next((names.index(name) for name in (index, *uuid) if name in names), None)


class Peak:
    """The most memory in use on each GPU, as nvidia-smi counts it, less what was in use before.

    One nvidia-smi prints it several times a second; `nbytes` stays empty where it prints no number.
    """

    def __init__(self) -> None:
        self.before = self._counted(smi("--query-gpu=memory.used"))
        self.most = list(self.before)

    def __enter__(self) -> Peak:
        command = ["nvidia-smi", "--query-gpu=index,uuid,memory.used", "--format=csv,noheader,nounits"]
        command += [f"--loop-ms={WATCH_MILLISECONDS}"]
        try:
            self._child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError:
            return self
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if hasattr(self, "_child"):
            self._child.kill()
            self._child.wait()
            self._thread.join(10)

    def _watch(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            if "," not in line:  # a message
                continue
            index, *uuid, used = [cell.strip() for cell in line.split(",")]
            place, nbytes = place_of(index, uuid, os.environ.get("CUDA_VISIBLE_DEVICES")), mebibytes(used)
            if nbytes is not None and place is not None and place < len(self.most):
                self.most[place] = max(self.most[place], nbytes)

    @staticmethod
    def _counted(rows: list[list[str]]) -> list[int]:
        found = [mebibytes(row[0]) for row in rows if row]
        return [each for each in found if each is not None]

    @property
    def nbytes(self) -> list[int]:
        return [most - before for most, before in zip(self.most, self.before, strict=True)]
