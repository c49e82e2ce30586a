"""An expert's matrices in half precision to one in any precision, in memory: what a store's record would hold."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from qmix.geometry import Geometry
from qmix.precision.formats import chunk_rows
from qmix.precision.matmul import Expert
from qmix.precision.quantizer import MatrixQuantizer
from qmix.precision.record import record_layout

CHUNK_WEIGHTS = 2**22  # quantised at once: what is made on the way stays small


def encoded(
    matrices: Mapping[str, torch.Tensor],
    geometry: Geometry,
    precision: str,
    dtype: str,
    name: str = "expert",
    clip: bool = False,
) -> Expert:
    """The expert of `matrices`, w1, w3 and w2 as [rows, cols], quantised as a store's would be.

    Raises CheckpointError, naming the expert, where a weight is NaN, infinite, or too large for what holds it.
    """
    layout = record_layout(geometry, precision, dtype)
    record = np.zeros(layout.nbytes, np.uint8)
    offsets: dict[str, list[int]] = {}
    for item in layout.parts:
        offsets.setdefault(item.matrix, []).append(item.offset)
    for matrix, (rows, cols) in geometry.expert_matrices.items():
        quantizer = MatrixQuantizer(precision, dtype, rows, cols, f"{name}.{matrix}", clip)
        main, *rest = offsets[matrix]
        step = chunk_rows(precision, rows, cols, CHUNK_WEIGHTS)
        for start in range(0, rows, step):
            offset, codes = quantizer.quantize(matrices[matrix][start : start + step], start)
            record[main + offset : main + offset + codes.nbytes] = codes
        scales = quantizer.scales()
        if scales is not None:
            record[rest[0] : rest[0] + scales.nbytes] = scales
    return Expert(torch.from_numpy(record), layout, geometry.expert_matrices)
