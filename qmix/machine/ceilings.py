"""Measure the rates of this machine's memory, disk and cores when they do nothing else: the ceilings of any run.

`python -m qmix.machine.ceilings` prints what needs no store; in a process of its own they take no memory of a run
under a budget.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from qmix.disk import PAGE
from qmix.errors import QmixError
from qmix.machine.found import available_memory, gpu_driver
from qmix.machine.probes import MEMORY_BYTES, ROUNDS, DiskProbe, Rate, best, matmul, memory_read
from qmix.store.opened import Store

GPU_BYTES = 2**28  # read and copied on a GPU
GPU_TIMES = 8  # in a round on a GPU: launching and waiting take tens of microseconds, reading a tenth of a millisecond
GPU_SIZE = 8192  # of the matrices multiplied there


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Rates of memory and disk in bytes/s and of products in FLOP/s; `disk_read` is None if no disk was needed.

    `gpus` has the rates of each GPU, by their names in `qmix.machine.rates.Rates`.
    """

    memory_read: Rate
    disk_read: Rate | None
    matmul: Rate
    gpus: tuple[dict[str, Rate], ...] = ()


def probe(store: Store) -> Ceilings:
    """Measure all three ceilings in this process, within seconds."""
    with DiskProbe.of_store(store) as disk:
        for _ in range(ROUNDS):
            disk.slice()
        return Ceilings(memory_read(), disk.rate(), matmul())


def probe_in_child() -> Ceilings:
    """Measure memory and cores in another process, which gives its memory back."""
    command = [sys.executable, "-m", "qmix.machine.ceilings"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        last = run.stderr.strip().splitlines()[-1:] or [f"ended with status {run.returncode}"]
        raise QmixError(f"measuring this machine failed: {last[0]}")
    found = json.loads(run.stdout)
    gpus = tuple({name: _read_rate(rate) for name, rate in gpu.items()} for gpu in found["gpus"])
    return Ceilings(_read_rate(found["memory_read"]), None, _read_rate(found["matmul"]), gpus)


def _read_rate(found: dict[str, Any]) -> Rate:
    """Return a rate from its JSON."""
    return Rate(tuple(found["rounds"]), found["how"])


def gpu_ceilings(device: torch.device) -> dict[str, Rate]:
    """Measure a GPU's memory, its half-precision products, and copies from pinned memory to it.

    The CPU in its place is measured alike.
    """
    host = torch.empty(GPU_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there, other = (torch.empty(GPU_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    words = there.zero_().view(torch.int32)
    reads: dict[str, tuple[int, Callable[[], object]]] = {
        "maximum of int32": (GPU_BYTES, words.max),
        "sum of float32": (GPU_BYTES, there.view(torch.float32).sum),
        "copy inside": (2 * GPU_BYTES, partial(other.copy_, there)),
    }
    a, b = (torch.ones(GPU_SIZE, GPU_SIZE, dtype=torch.float16, device=device) for _ in range(2))
    link = partial(there.copy_, host, non_blocking=True)
    return {
        "gpu_memory": best(_device_rate(device, count, work, how) for how, (count, work) in reads.items()),
        "gpu_matmul": _device_rate(device, 2 * GPU_SIZE**3, lambda: a @ b, "float16"),
        "pcie": _device_rate(device, GPU_BYTES, link, "copy from pinned memory"),
    }


def _device_rate(device: torch.device, count: int, work: Callable[[], object], how: str) -> Rate:
    """Measure work of `count` bytes or FLOP; each round waits for the device once."""
    on_cuda = device.type == "cuda"
    times, found = GPU_TIMES if on_cuda else 1, []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        for _ in range(times):
            work()
        if on_cuda:
            torch.cuda.synchronize(device)
        found.append(times * count / (time.perf_counter() - started))
    return Rate(tuple(found[1:]), how)  # the first one loads the library


def main() -> None:
    room = min(MEMORY_BYTES, available_memory() // 4) // PAGE * PAGE
    gpus = range(torch.cuda.device_count() if gpu_driver() and torch.cuda.is_available() else 0)
    found = {"memory_read": memory_read(room).to_json(), "matmul": matmul().to_json()}
    ceilings = [gpu_ceilings(torch.device("cuda", index)) for index in gpus]
    print(json.dumps(found | {"gpus": [{name: rate.to_json() for name, rate in gpu.items()} for gpu in ceilings]}))


if __name__ == "__main__":
    main()
