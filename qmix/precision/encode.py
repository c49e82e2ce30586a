"""Quantise an expert in memory, to the bytes that a store's record would have."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from qmix.geometry import Geometry
from qmix.precision.expert import Expert
from qmix.precision.formats import chunk_rows
from qmix.precision.quantizer import MatrixQuantizer
from qmix.precision.record import record_layout

CHUNK_WEIGHTS = 2**22  # quantised at once, which bounds the scratch memory


def encoded(
    matrices: Mapping[str, torch.Tensor],
    geometry: Geometry,
    precision: str,
    dtype: str,
    name: str = "expert",
    clip: bool = False,
) -> Expert:
    """Return the expert of `matrices`, w1, w3 and w2 as [rows, cols], quantised as in a store.

    Raises CheckpointError, naming the expert, if a weight is NaN, infinite, or too large for the precision.
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
