"""Find the kernels of a step, and what of a model they take.

Triton is imported only where a model may run with them: on CUDA, or in Triton's interpreter with the CPU as the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import MixtralConfig

from qmix.errors import QmixError, arg
from qmix.kernels.gpu.shapes import ExpertShape, available, fits, fits_attention
from qmix.precision.record import RecordLayout
from qmix.store.layout import StoreLayout

Kernels = Any  # TritonKernels, or shape functions in its place
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # angles that do not change with the length of the text


class TritonKernels:
    """The kernels of `qmix.kernels.gpu`, with the address of a tensor for them."""

    def __init__(self) -> None:
        from qmix.kernels.gpu import attention, dense, moe, norms, prefill, sample

        self.linear, self.rotate, self.attend = dense.linear, attention.rotate, attention.attend
        self.norm, self.Router, self.Mixture = norms.norm, norms.Router, norms.Mixture
        self.gate_up, self.down, self.sample = moe.gate_up, moe.down, sample.sample
        self.dense, self.in_place = prefill.forward, prefill.in_place

    def address(self, tensor: torch.Tensor) -> int:
        """Return where a tensor lies on its device."""
        return tensor.data_ptr()


def expert_shape(layout: RecordLayout, hidden: int, inner: int) -> ExpertShape:
    """Return the places of a record's parts as the kernels take them."""
    first = {name: [item.offset for item in layout.parts if item.part.name in names] for name, names in _PARTS.items()}
    scales = first["scales"] or [0, 0, 0]
    codes = first["codes"]
    return ExpertShape(
        layout.precision, hidden, inner, (codes[0], codes[1], codes[2]), (scales[0], scales[1], scales[2])
    )


_PARTS = {"codes": ("codes", "weight"), "scales": ("absmax", "row_max")}


def expert_shapes(layout: StoreLayout) -> dict[str, ExpertShape]:
    """Return the shape of a store's records by precision."""
    geometry = layout.geometry
    return {
        name: expert_shape(record, geometry.hidden_size, geometry.intermediate_size)
        for name, record in layout.records.items()
    }


def find_kernels(
    layout: StoreLayout, context: int, config: MixtralConfig, devices: Sequence[torch.device]
) -> Kernels | None:
    """Return the kernels for a model whose GPUs are `devices`; None where they do not take it.

    Raises QmixError where Triton lacks something to launch them that can be installed: without them a GPU is several
    times slower.
    """
    if not takes(layout, context, config) or not available():
        return None
    for device in devices:
        if device.type == "cpu":
            import triton

            if not triton.knobs.runtime.interpret:
                return None
        elif device.type != "cuda" or not _fits_card(layout, torch.cuda.get_device_capability(device)):
            return None
    if any(device.type == "cuda" for device in devices):
        from qmix.kernels.gpu.launching import launch_fault

        if fault := launch_fault():
            raise QmixError(f"{fault}, or give {arg('gpu', 'none')} to run on the CPU")
    return TritonKernels()


def takes(layout: StoreLayout, context: int, config: MixtralConfig) -> bool:
    """Return whether the kernels compute such a model; the cards are not looked at."""
    geometry, window = layout.geometry, config.sliding_window
    return (
        config.hidden_act == "silu"
        and (window is None or window >= context)
        and (config.rope_parameters or {}).get("rope_type", "default") in STATIC_ROPE
        and fits_attention(geometry.num_heads, geometry.num_kv_heads, geometry.head_dim)
        and _fits_card(layout, None)
    )


def _fits_card(layout: StoreLayout, capability: tuple[int, int] | None) -> bool:
    return all(fits(shape, layout.dtype, capability) for shape in expert_shapes(layout).values())
