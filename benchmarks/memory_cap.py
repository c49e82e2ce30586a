"""Run a command in a cgroup (v1 or v2) that limits its memory, page cache included. Needs root.

    python benchmarks/memory_cap.py 8GiB COMMAND [ARGUMENT ...]
    python benchmarks/memory_cap.py none COMMAND [ARGUMENT ...]          the page cache dropped, memory only counted

The machine's page cache is dropped first, because pages that another group has loaded would not count. Passes on the
command's output and exit status. Prints one JSON line to stderr at the end, with the group's count of its peak.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from qmix.units import parse_bytes

ROOT = Path("/sys/fs/cgroup")
EMPTY_SECONDS = 10.0  # how long a group may take to let go of processes that were killed


class CapError(Exception):
    """A cgroup cannot be made here: what is missing."""


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """A cgroup that processes may be put in, and its own count of their memory in bytes."""

    directory: Path
    version: int

    def run(self, command: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
        """subprocess.run inside the group, as text; a command killed for its memory has returncode -9."""
        return subprocess.run([*self.prefix, *command], text=True, check=False, **options)

    @property
    def prefix(self) -> tuple[str, ...]:
        """Return the words before a command so that it runs in the group from its start."""
        return ("sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.directory / "cgroup.procs"))

    @property
    def peak(self) -> int | None:
        """The most so far, page cache included; None where a kernel before 5.19 does not count it."""
        file = self.directory / ("memory.max_usage_in_bytes" if self.version == 1 else "memory.peak")
        return int(file.read_text()) if file.exists() else None

    @property
    def killed(self) -> int:
        """Processes killed for want of memory."""
        file = self.directory / ("memory.oom_control" if self.version == 1 else "memory.events")
        counts = dict(line.split() for line in file.read_text().splitlines())
        return int(counts.get("oom_kill", 0))


@contextmanager
def memory_group(limit: int | None, drop_cache: bool = True) -> Iterator[MemoryGroup]:
    """Make a group held to `limit` bytes (None: counted only), the machine's page cache dropped before.

    What still runs in it at the end is killed, and the group removed. Raises CapError without the rights to do this.
    """
    if os.geteuid():
        raise CapError("holding a command to a memory limit takes a cgroup, and that takes root")
    version, parent = (1, ROOT / "memory") if (ROOT / "memory").is_dir() else (2, ROOT)
    group = MemoryGroup(parent / f"qmix-{os.getpid()}-{time.monotonic_ns()}", version)
    try:
        group.directory.mkdir()
    except OSError as error:
        raise CapError(f"{group.directory}: {error.strerror}; cgroups cannot be made here") from None
    try:
        if limit is not None:
            _limit(group, limit)
        if drop_cache:
            drop_page_cache()
        yield group
    finally:
        _remove(group)


def _limit(group: MemoryGroup, limit: int) -> None:
    total, with_swap = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
    if group.version == 2:
        total, with_swap = ("memory.max", "memory.swap.max")
    if not (group.directory / total).exists():
        raise CapError(f"{group.directory}: has no {total}; the memory controller is not switched on")
    (group.directory / total).write_text(str(limit))
    if (group.directory / with_swap).exists():  # no swap beyond it
        (group.directory / with_swap).write_text(str(limit if group.version == 1 else 0))


def drop_page_cache() -> None:
    """Write back and forget what the machine has cached of files."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def _remove(group: MemoryGroup) -> None:
    deadline = time.monotonic() + EMPTY_SECONDS
    while processes := (group.directory / "cgroup.procs").read_text().split():
        if time.monotonic() > deadline:
            raise CapError(f"{group.directory}: processes {', '.join(processes)} do not end; remove the group by hand")
        for process in processes:
            try:
                os.kill(int(process), signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)
    group.directory.rmdir()


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--keep-cache", is_flag=True, help="Drop nothing; pages cached already then count for nobody.")
@click.argument("limit")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def main(keep_cache: bool, limit: str, command: tuple[str, ...]) -> None:
    """Run COMMAND held to LIMIT, such as 8GiB, or `none`."""
    try:
        with memory_group(None if limit == "none" else parse_bytes(limit), not keep_cache) as group:
            status = group.run(command).returncode
            click.echo(json.dumps({"limit": limit, "peak": group.peak, "killed": group.killed}), err=True)
    except CapError as error:
        raise click.ClickException(str(error)) from None
    sys.exit(status if status >= 0 else 128 - status)


if __name__ == "__main__":
    main()
