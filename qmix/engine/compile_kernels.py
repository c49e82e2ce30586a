"""`python -m qmix.engine.compile_kernels` compiles the kernels of large models for this processor, on all cores.

They are kept on disk, so that no run has to compile any. Together they take 20 seconds of a core, the longest 4.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

from qmix.precision.formats import FOUR_BITS, PRECISIONS


def _layer() -> None:
    from qmix.kernels.cpu import attention_half

    attention_half.half_layer_kernel()


def _team() -> None:
    from qmix.kernels.cpu import team

    team.Team()  # starts no thread


def _experts() -> None:
    from qmix.kernels.cpu import experts

    experts.experts_kernel()


def _step() -> None:
    from qmix.kernels.cpu import resident_step

    resident_step.resident_step_kernel()


def _rows() -> None:
    from qmix.kernels.cpu import row_by_row

    row_by_row.norm_kernel()
    row_by_row.choose_kernel()


def _attention_block() -> None:
    import torch

    from qmix.kernels.cpu import attention, products

    attention.block_of(products.holds_of(torch.bfloat16))


def _sums(precision: str) -> None:
    import torch

    from qmix.kernels.cpu import products, sums

    sums.sums_of(products.holds_in(precision, torch.bfloat16))


def _attention() -> None:
    from qmix.kernels.cpu import attention

    attention.attention_kernel()


def _product() -> None:
    from qmix.kernels.cpu import products

    products.product_kernel()


def _dequantize(kind: str) -> None:
    from qmix.kernels.cpu import dequantize

    dequantize.prepare(kind)


# The longest first, so that all cores end at about the same time.
PARTS: tuple[Callable[[], None], ...] = (
    _layer,
    _experts,
    _attention_block,
    *(partial(_sums, precision) for precision in reversed(PRECISIONS)),
    _product,
    _attention,
    _step,
    _rows,
    _team,
    *(partial(_dequantize, kind) for kind in FOUR_BITS),
)


def main() -> None:
    workers = min(len(PARTS), len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for job in [pool.submit(part) for part in PARTS]:
            job.result()


if __name__ == "__main__":
    main()
