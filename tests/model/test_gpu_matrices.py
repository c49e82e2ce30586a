"""Products of experts as on a GPU, with the CPU as the device: equality with bitsandbytes' own."""

from __future__ import annotations

import pytest
import torch

from qmix.checkpoint.torch_dtypes import TORCH
from qmix.geometry import Geometry
from qmix.kernels.packing import BLOCK
from qmix.model.gpu.matrices import DeviceFourBit, DeviceHalf, DeviceInt8, code_values, dequantise, device_expert
from qmix.plan.device_memory import dequantised_bytes
from qmix.precision.bitsandbytes import functional as bnb
from qmix.precision.expert import Expert
from qmix.precision.formats import parts
from qmix.precision.quantizer import MatrixQuantizer
from qmix.precision.record import record_layout

SHAPES = [(32, 64), (96, 128), (320, 256), (72, 100), (31, 65)]


def weights(rows: int, cols: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).bfloat16()


def quantised(kind: str, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and absmax in a record's layout."""
    rows, cols = matrix.shape
    quantizer = MatrixQuantizer(kind, "bf16", rows, cols, "w")
    codes = torch.from_numpy(quantizer.quantize(matrix, 0)[1].copy())
    scales = quantizer.scales()
    assert scales is not None
    main, absmax = parts(kind, "bf16", rows, cols)
    return codes.view(main.shape), torch.from_numpy(scales.copy()).view(TORCH[absmax.dtype]).view(absmax.shape)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_record_is_dequantised_as_bitsandbytes_dequantises_it(kind, rows, cols, monkeypatch):
    """In one piece, and in pieces of one group of 32 rows."""
    codes, absmax = quantised(kind, weights(rows, cols))
    _, state = bnb.quantize_4bit(weights(rows, cols), blocksize=BLOCK, quant_type=kind)
    ordinary = bnb.quantize_4bit(weights(rows, cols), blocksize=BLOCK, quant_type=kind)[0]
    state.absmax = state.absmax.bfloat16().float()  # a store rounds it
    want = bnb.dequantize_4bit(ordinary, state)
    values = code_values([kind], torch.device("cpu"))[kind]
    for at_once in (2**21, 1):
        monkeypatch.setattr("qmix.model.gpu.matrices.DEQUANTISED_AT_ONCE", at_once)
        got = torch.empty(rows, cols, dtype=torch.bfloat16)
        dequantise(codes, absmax, values, got)
        assert torch.equal(got, want.view(rows, cols))


def test_an_int8_product_by_hand():
    codes, row_max = torch.tensor([[127, -127], [64, 0]], dtype=torch.int8), torch.tensor([2.0, 1.27])
    got = DeviceInt8(2, 2, codes, row_max).multiply(torch.tensor([[1.0, 0.5]], dtype=torch.bfloat16))
    # row 0: (127 - 63.5) * 2 / 127 = 1; row 1: 64 * 1.27 / 127 = 0.64
    assert got.tolist() == [[1.0, torch.tensor(0.64).bfloat16().item()]]


def test_operands_on_different_devices_are_refused_before_a_kernel_sees_them():
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    codes, absmax = torch.zeros(32, 32, dtype=torch.uint8), torch.ones(1, 32, dtype=torch.bfloat16)
    dense = torch.zeros(32, 64, dtype=torch.bfloat16)
    for left_behind in (
        DeviceFourBit(codes, absmax.to("meta"), torch.zeros(16), dense),
        DeviceFourBit(codes, absmax, torch.zeros(16), dense.to("meta")),
        DeviceInt8(32, 64, torch.zeros(32, 64, dtype=torch.int8), torch.ones(32, device="meta")),
        DeviceHalf(32, 64, torch.zeros(32, 64, dtype=torch.bfloat16, device="meta")),
    ):
        with pytest.raises(RuntimeError, match="operands on cpu, meta"):
            left_behind.multiply(x)


@pytest.mark.parametrize("precision", ["nf4", "fp4", "int8", "half"])
def test_an_expert_computes_what_it_does_in_main_memory(precision):
    geometry = Geometry(64, 128, 1, 4, 2, 16, 1, 1, 96, 256)
    layout = record_layout(geometry, precision, "bf16")
    record = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for item in layout.parts:
        rows, cols = geometry.expert_matrices[item.matrix]
        matrix = weights(rows, cols, seed=len(item.matrix) + ord(item.matrix[-1])) / 8
        quantizer = MatrixQuantizer(precision, "bf16", rows, cols, "w")
        main = quantizer.quantize(matrix, 0)[1]
        raw = main if item.part.name in ("codes", "weight") else quantizer.scales()
        record[item.offset : item.offset + item.part.nbytes] = torch.from_numpy(raw.copy().reshape(-1))
    memory = torch.empty(dequantised_bytes(geometry, [precision]), dtype=torch.uint8).view(torch.bfloat16)
    values = code_values([precision], torch.device("cpu")).get(precision)
    x = weights(7, 64, seed=9)
    got = device_expert(record, layout, geometry.expert_matrices, memory, values)(x, torch.nn.functional.silu)
    want = Expert(record, layout, geometry.expert_matrices)(x, torch.nn.functional.silu)
    assert (got - want).float().norm() < 0.01 * want.float().norm()
