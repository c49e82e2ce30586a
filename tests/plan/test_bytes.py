"""Bytes of passes and of GPUs' records by hand, and how they grow."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from qmix.checkpoint.safetensors_header import aligned
from qmix.errors import DoesNotFitError
from qmix.geometry import Geometry
from qmix.models.published import PUBLISHED
from qmix.plan.device_memory import (
    STEP_BYTES,
    captured_tokens,
    dequantised_bytes,
    device_record_bytes,
    pinned_bytes,
    staging_bytes,
    step_buffer_bytes,
    usable_device_bytes,
)
from qmix.plan.memory import (
    LAYERWISE_SLACK,
    calibration_bytes,
    check_memory,
    layerwise_bytes,
    usable_bytes,
    with_reserve,
)

SMALL = Geometry(64, 128, 2, 4, 2, 16, 4, 2, 96, 256)


def checkpoint(*dtypes: str) -> SimpleNamespace:
    return SimpleNamespace(geometry=SMALL, weights={dtype: SimpleNamespace(dtype=dtype) for dtype in dtypes})


def test_a_budget_with_reserve_leaves_what_was_needed():
    assert with_reserve(10**9) == 1_010_000_000 + 16 * 2**20
    assert usable_bytes(with_reserve(10**9)) == 10**9
    assert usable_device_bytes((600 + 64) * 2**20 + 4_080) == 4_000  # CUDA's context, the driver, 2%
    assert usable_device_bytes((400 + 64) * 2**20 + 4_080, 400 * 2**20) == 4_000


def test_an_expert_on_a_gpu_by_hand():
    weights = 3 * 128 * 64
    assert device_record_bytes(SMALL, "nf4", "bf16") == aligned(weights // 2 + weights // 64 * 2, 4096)  # bf16 absmax
    assert device_record_bytes(SMALL, "half", "bf16") == weights * 2
    large = PUBLISHED["mixtral-8x22b"].geometry
    assert device_record_bytes(large, "nf4", "bf16") == 3 * 6144 * 16384 * 17 // 32  # 4.25 bits a weight
    assert device_record_bytes(large, "int8", "bf16") == aligned(3 * 6144 * 16384 + 4 * (2 * 16384 + 6144), 4096)


def test_buffers_of_a_gpu_by_hand():
    record = device_record_bytes(SMALL, "int8", "bf16")
    assert staging_bytes(SMALL, ("nf4", "int8"), "bf16") == 2 * record
    assert dequantised_bytes(SMALL, ("nf4", "int8")) == 128 * 64 * 2
    assert dequantised_bytes(SMALL, ("int8", "half")) == 0
    assert [captured_tokens(SMALL, 300, batch) for batch in (1, 9, 256)] == [32, 32, 32]


@pytest.mark.parametrize(("context", "tokens"), [(4096, 32), (8192, 16), (65536, 8)])
def test_long_contexts_leave_room_for_shorter_drafts(context, tokens):
    large = PUBLISHED["mixtral-8x22b"].geometry
    assert captured_tokens(large, context) == tokens
    assert captured_tokens(large, context, batch=2) == 32
    assert step_buffer_bytes(large, tokens, context) <= max(STEP_BYTES, step_buffer_bytes(large, 8, context))
    assert tokens == 32 or step_buffer_bytes(large, 2 * tokens, context) > STEP_BYTES


def test_a_captured_steps_buffers_by_hand():
    """2 tokens of a model 64 wide, 4 heads and 2 key heads of 16, 2 of 4 experts 128 wide; 300 positions in 3 parts."""
    rows = 2 * (3 * 64 + 2 * 64 + 2 * 32) * 2
    sums = 2 * 4 * 3 * (16 + 2) * 4
    experts = 4 * (128 + 64) * 2 + 4 * 64 * 4
    routing, rotary = 4 * 12 + 8 * 8, 300 * 16 * 4
    assert step_buffer_bytes(SMALL, 2, 300, last=False) == rows + sums + experts + routing + rotary
    assert step_buffer_bytes(SMALL, 2, 300) - step_buffer_bytes(SMALL, 2, 300, last=False) == 2 * 96 * 4
    assert pinned_bytes(SMALL, 2, 1) == 4 * 8 + (2 + 4) * 64 * 2 + 4 * 4 * 8  # ids; x and results; addresses
    assert pinned_bytes(SMALL, 2, 3) == 3 * pinned_bytes(SMALL, 2, 1)


def test_a_layerwise_pass_by_hand():
    """1000 tokens of two variants: hidden states, the logits of a chunk, and a layer with the experts held."""
    states = 1000 * 2 * 64 * 8
    logits = 512 * (4 * 128 + 4 * 64) * 4  # here a chunk through an expert takes more
    attention = (4 + 2) * 16 * 64 * 2 * 2
    weights = attention + 2 * 3 * 64 * 128 * 2 + 700 + 300
    found = layerwise_bytes(checkpoint("BF16"), 1000, 100, [700, 300])
    assert found == LAYERWISE_SLACK + states + max(logits, 512 * 96 * 4 * 6) + weights
    rounded = layerwise_bytes(checkpoint("F32"), 1000, 100, [700, 300]) - found
    assert rounded == 64 * 128 * 4  # one matrix as the checkpoint has it


def test_calibration_by_hand():
    """1000 tokens, 128 samples, and guesses up to 4 layers ahead, whose tables are 4 + 3 + 2 + 1 layers'."""
    gates = 2 * 4 * 64 * 6
    routing = 1000 * (2 * 2 * (2 + 10) + 4 * 3 * 8)
    samples = 128 * (4 * 64 * 2 + 4 * 128 * 2 + 4 * 64 * 4)
    assert calibration_bytes(SMALL, 1000, 128, 4) == gates + routing + samples + 2 * 64 * 128


def test_a_budget_too_small_is_refused_with_the_bytes_that_work():
    check_memory(10**9, 10**9, 1000)
    with pytest.raises(DoesNotFitError, match=r"1000 tokens take 1 GB .* ram='1000MB'") as caught:
        check_memory(10**9, 10**9 - 1, 1000)
    assert caught.value.smallest == 10**9
