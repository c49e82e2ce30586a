"""`python -m qmix.engine.compile_kernels` compiles the kernels of large models for this processor, on several cores.

They are kept on disk, so that no run has to compile any. Each takes 5 to 20 seconds of one core.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from qmix.precision.formats import FOUR_BITS, PRECISIONS


def compile_experts() -> None:
    """Compile what computes the experts of a layer, or load it from the disk."""
    from qmix.kernels.cpu import experts

    for precision in PRECISIONS:
        experts.prepare(precision, torch.bfloat16)


def compile_layer() -> None:
    """Compile what computes all else of a layer for one token, or load it from the disk."""
    from qmix.kernels.cpu import attention_half

    attention_half.prepare()


def compile_products() -> None:
    """Compile single products and attention, or load them from the disk."""
    from qmix.kernels.cpu import attention, dequantize, products

    products.prepare(PRECISIONS, torch.bfloat16)
    for kind in FOUR_BITS:
        dequantize.prepare(kind)
    keys = torch.zeros(1, 1, 8, 64, dtype=torch.bfloat16)
    attention.attend(keys[:, :, :1], keys, keys, None, 1.0)


PARTS = (compile_experts, compile_layer, compile_products)  # Numba's file of one must not be written by two processes


def main() -> None:
    workers = min(len(PARTS), len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for job in [pool.submit(part) for part in PARTS]:
            job.result()


if __name__ == "__main__":
    main()
