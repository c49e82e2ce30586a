"""Kernels compile for cards that are not there, use their tensor cores, and issue few enough instructions."""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from compiling import Launch, launches, tool, usage

from qmix.kernels.gpu import attention, dense, moe, norms, prefill, sample
from qmix.kernels.gpu.shapes import ExpertShape, attention_splits, down_splits, sample_blocks

pytestmark = pytest.mark.slow
HIDDEN, INNER, EXPERTS, HEADS, KV_HEADS, WIDTH, VOCABULARY = 4096, 14336, 8, 32, 8, 128, 32000  # of 8x7B
CARDS = {"sm_80": 80, "sm_89": 89, "sm_90": 90, "sm_120": 120}
TURING = 75
SHARED = {75: 64, 80: 163, 89: 99, 90: 227, 120: 99}  # KiB of a program (CUDA programming guide, compute capabilities)
SLOTS = 6.4  # instructions that an H100 issues while it reads a weight of 4.25 bits
OLDER_TRITON = tuple(map(int, version("triton").split(".")[:2])) < (3, 9)
ITEMS = {"nf4": 0.5, "fp4": 0.5, "int8": 1, "half": 2}  # bytes of a weight, without its scales


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("triton"))


@pytest.fixture(autouse=True)
def cuda(monkeypatch, cache):
    """torch's build for CUDA, of which only the version is asked for; and a cache of compiled kernels of its own."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("TRITON_CACHE_DIR", cache)
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


def shape_of(precision: str) -> ExpertShape:
    size = int(HIDDEN * INNER * ITEMS[precision])
    return ExpertShape(precision, HIDDEN, INNER, (0, 2 * size, 4 * size), (size, 3 * size, 5 * size))


def expert_launches(patch: Any, precision: str, dtype: torch.dtype, tokens: int, grouped: bool = False) -> list[Launch]:
    """Return the launches of a step's mixture: gate and up, then down."""
    shape, ids = shape_of(precision), torch.zeros(tokens, 2, dtype=torch.int64)
    addresses, x = torch.zeros(EXPERTS, dtype=torch.int64), torch.empty(tokens, HIDDEN, dtype=dtype)
    inner, parts = x.new_empty(2 * tokens, INNER), torch.empty(down_splits(INNER), 2 * tokens, HIDDEN)
    groups = moe.group(ids, EXPERTS) if grouped else None

    def call() -> None:
        moe.gate_up(shape, addresses, ids, x, inner, groups)
        moe.down(shape, addresses, ids, inner, parts, groups)

    return launches(patch, call)


def step_launches(patch: Any, dtype: torch.dtype) -> list[Launch]:
    """Return the launches of a step besides the experts, and of a dequantised matrix."""
    x, width = torch.empty(1, HIDDEN, dtype=dtype), (HEADS + 2 * KV_HEADS) * WIDTH
    ids, addresses = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(EXPERTS, dtype=torch.int64)
    weights, position = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    qkv, table = x.new_empty(1, width), x.new_empty(8192, WIDTH // 2)
    cache, blocks = x.new_empty(1, KV_HEADS, 8192, WIDTH), torch.empty(1, sample_blocks(VOCABULARY))
    sums = torch.empty(1, HEADS, attention_splits(8192), WIDTH)
    wide, logits = x.new_empty(1, 6144), torch.empty(1, VOCABULARY)
    mixture = norms.Mixture(torch.empty(4, 2, HIDDEN), ids, weights, addresses, x.new_empty(2, HIDDEN))

    def call() -> None:
        norms.norm(x, x[0], x, 1e-5, mixture=mixture)
        norms.norm(x, x[0], x, 1e-5, delta=x, router=norms.Router(x.new_empty(8, HIDDEN), ids, weights, position))
        norms.norm(wide, wide[0], wide, 1e-5, delta=wide, router=norms.Router(x.new_empty(8, 6144), ids, weights))
        attention.rotate(qkv, table, table, cache, cache, position, position)
        attention.attend(qkv, cache, cache, position, position, sums, sums[..., :2].contiguous(), x)
        dense.linear(x, x.new_empty(width, HIDDEN), qkv)
        sample.sample(logits, weights[:, 0], position, position, blocks, blocks.int(), position)
        record = torch.empty(shape_of("nf4").scales[2] + HIDDEN * INNER // 32, dtype=torch.uint8)
        prefill.dequantize(shape_of("nf4"), record, 2, x.new_empty(HIDDEN * INNER))

    return launches(patch, call)


def fits_shared(made: Any, card: int) -> bool:
    """Return whether a program has no more shared memory than a card gives one."""
    return bool(made.metadata.shared <= SHARED[card] * 1024)


def products(made: Any) -> set[str]:
    """Return the tensor cores' instructions in a kernel's PTX."""
    return set(re.findall(r"mma\.sync[.\w]*", made.asm["ptx"])) | set(re.findall(r"wgmma[.\w]*", made.asm["ptx"]))


@pytest.mark.parametrize(
    ("card", "precision", "dtype"),
    [
        ("sm_80", "nf4", torch.bfloat16),
        ("sm_80", "half", torch.bfloat16),
        ("sm_89", "fp4", torch.float16),
        ("sm_90", "nf4", torch.bfloat16),
        ("sm_90", "int8", torch.bfloat16),
        ("sm_120", "nf4", torch.bfloat16),
    ],
)
def test_experts_use_tensor_cores_without_spilling(monkeypatch, card, precision, dtype):
    for launch in expert_launches(monkeypatch, precision, dtype, 1):
        made = launch.compile(CARDS[card])
        half = "bf16" if dtype is torch.bfloat16 else "f16"
        assert products(made) == {f"mma.sync.aligned.m16n8k16.row.col.f32.{half}.{half}.f32"}
        assert usage(made)[1] == 0
        assert fits_shared(made, CARDS[card])
        assert ("shfl.sync.idx.b32" in made.asm["ptx"]) == (precision in ("nf4", "fp4"))


@pytest.mark.parametrize(("tokens", "grouped"), [(8, False), (32, False), (64, True)])
def test_any_number_of_tokens_has_the_same_products(monkeypatch, tokens, grouped):
    """One instruction, whose sums do not depend on the number of tokens, in the same order along the columns."""
    for launch in expert_launches(monkeypatch, "nf4", torch.bfloat16, tokens, grouped):
        made = launch.compile(90)
        assert products(made) == {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"}
        assert usage(made)[1] == 0 or (grouped and OLDER_TRITON)  # older versions spill 344 bytes there
        assert fits_shared(launch.compile(120), 120)


@pytest.mark.parametrize("card", CARDS)
def test_the_rest_of_a_step_does_not_spill(monkeypatch, card):
    for launch in step_launches(monkeypatch, torch.bfloat16):
        made = launch.compile(CARDS[card])
        assert usage(made)[1] == 0
        assert fits_shared(made, CARDS[card])


def test_turing(monkeypatch):
    """In fp16, and without tensor cores: Triton (3.9) has no products for Turing's."""
    for module in (moe, dense):
        monkeypatch.setattr(module, "tile_of", lambda tokens, device: tokens)
    for launch in (*expert_launches(monkeypatch, "nf4", torch.float16, 1), *step_launches(monkeypatch, torch.float16)):
        made = launch.compile(TURING)
        assert ".bf16" not in made.asm["ptx"]
        assert fits_shared(made, TURING)


def inner_loop(sass: str) -> list[str]:
    """Return the instructions of the longest loop of a listing."""
    lines = [line for line in sass.splitlines() if re.match(r"\s+/\*[0-9a-f]+\*/|\.L", line)]
    labels = {line.strip().rstrip(":"): i for i, line in enumerate(lines) if line.startswith(".L")}
    jumps = [(labels.get(m[1], i), i) for i, line in enumerate(lines) if (m := re.search(r"BRA `\((\.L[^)]*)\)", line))]
    first, last = max(jumps, key=lambda jump: jump[1] - jump[0])
    return [line for line in lines[first:last] if not line.startswith(".L")]


def test_instructions_for_a_weight_leave_room_for_reading_it(monkeypatch):
    gate_up, down = expert_launches(monkeypatch, "nf4", torch.bfloat16, 1)
    for launch, matrices in ((gate_up, 2), (down, 1)):
        loop = inner_loop(tool("nvdisasm", launch.compile(90), "-c"))
        weights = matrices * 16 * 32 * 8 / 32  # of a lane in a turn of the loop
        assert len(loop) / weights < SLOTS * 0.7
