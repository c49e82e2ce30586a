"""Measure the memory of a GPU that CUDA's context takes, which torch does not count.

`python -m qmix.machine.cuda_context INDEX` opens a context as a run does, prints the bytes that torch itself has
reserved, and keeps the context until its stdin ends. The process that started it compares the free memory.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence

SIZE = 256  # rows and columns of the product that loads cuBLAS


def context_bytes(index: int) -> int | None:
    """Return the bytes that a fresh context takes on a GPU; None where it could not be opened."""
    import torch

    command = [sys.executable, "-m", "qmix.machine.cuda_context", str(index)]
    return taken_by(command, lambda: torch.cuda.mem_get_info(index)[0])


def taken_by(command: Sequence[str], free: Callable[[], int]) -> int | None:
    """Return by how much `free` falls while a command runs, less the bytes that the command prints.

    None where it ends without printing any.
    """
    before = free()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        counted = child.stdout.readline()
        after = free()
        child.communicate()  # ends its stdin
    return max(0, before - after - int(counted)) if counted.strip() else None


def main() -> None:
    import torch

    device = torch.device("cuda", int(sys.argv[1]))
    ones = torch.ones(SIZE, SIZE, dtype=torch.float16, device=device)
    (ones @ ones).sum().item()
    print(torch.cuda.memory_reserved(device), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
