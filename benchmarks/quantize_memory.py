"""Quantise a checkpoint in a process of its own, and measure its anonymous memory above the imports, and its rate.

python benchmarks/synthetic.py /tmp/experts --layers 1 --hidden 6144 --intermediate 16384 --experts 2 --heads 48
python benchmarks/quantize_memory.py /tmp/experts
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

IMPORTS = (
    "import torch, numba, qmix.checkpoint, qmix.engine.resolve, qmix.store.quantize, qmix.terminal.progress, time; "
    "time.sleep(1)"
)
LOOK_SECONDS = 0.01


def peak_anonymous(*arguments: str) -> int:
    """Return the most anonymous memory that a Python held, in bytes, looked at every ten milliseconds."""
    peak = 0
    with subprocess.Popen([sys.executable, *arguments], stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            if "RssAnon:" in status:
                peak = max(peak, int(status.split("RssAnon:")[1].split()[0]) * 1024)
            time.sleep(LOOK_SECONDS)
    if process.returncode:
        raise click.ClickException(f"{' '.join(arguments)} ended with status {process.returncode}")
    return peak


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.option("--precision", default="nf4", show_default=True)
def main(checkpoint: Path, precision: str) -> None:
    """Print one JSON line; sizes in bytes, GB/s of checkpoint read."""
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as scratch:
        imports = peak_anonymous("-c", IMPORTS)
        started = time.perf_counter()
        store = f"{scratch}/store"
        peak = peak_anonymous("-m", "cli", "quantize", str(checkpoint), store, "--precision", precision)
        seconds = time.perf_counter() - started
        shutil.rmtree(store)
    figures = {"above_imports": peak - imports, "imports": imports, "checkpoint": size, "seconds": seconds}
    print(json.dumps({"precision": precision, **figures, "gb_per_s": size / seconds / 1e9}))


if __name__ == "__main__":
    main()
