"""What lies where under a budget: a pure function from sizes to a frozen plan. Loads no torch.

A process holds the interpreter, the dense weights, the KV cache, the work space of one step, and a pool of expert
records; what does not fit the pool stays on disk. `total` is the peak that a run is predicted to reach.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from qmix.errors import DoesNotFitError
from qmix.geometry import HALF_BYTES, Geometry
from qmix.layout import StoreLayout
from qmix.placement import even_use, host_placement
from qmix.units import format_bytes

DEFAULT_CONTEXT = 4096
PREFILL_CHUNK = 512  # tokens; the same for every budget, so that the same prompt gives the same text
MIN_SLOTS = 2  # one expert computes while the next is read
RESERVE_BYTES = 16 * 2**20  # page tables, the allocator's slack
RESERVE_SHARE = 0.01
SLOW_PATH_BYTES = 8 * 2**20  # rows dequantised where no kernel takes a matrix


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """Bytes of each part of a run on one GPU, whose ceiling is `budget`. `experts` are residents that stay."""

    name: str  # "gpu:0"
    budget: int
    dense: int
    kv_cache: int
    experts: int
    work: int

    @property
    def total(self) -> int:
        """The predicted peak of allocated memory."""
        return self.dense + self.kv_cache + self.experts + self.work

    @property
    def headroom(self) -> int:
        """What the budget leaves free: CUDA's own context, the allocator's slack."""
        return self.budget - self.total


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes of each part of a run, and where each layer and expert lies.

    `layer_devices` says for each layer where its dense weights and KV cache lie, "cpu" or "gpu:0"; embeddings lie with
    the first layer, the last norm and the head with the last. `placement` is [layer][expert]: "gpu:0" for a resident
    that stays there, "ram" or "disk" for where the others are at the start; which of them the pool's `slots` hold
    later is decided by use. `interpreter`, `dense`, `kv_cache`, `work` and the pool are the host's.
    """

    ram: int
    context: int
    batch: int
    interpreter: int
    dense: int
    kv_cache: int
    work: int
    slots: int
    slot_bytes: int
    num_records: int
    expert_bytes: dict[str, int]
    store_bytes: int
    devices: tuple[DevicePlan, ...] = ()
    layer_devices: tuple[str, ...] = ()
    placement: tuple[tuple[str, ...], ...] = ()

    @property
    def pool(self) -> int:
        return self.slots * self.slot_bytes

    @property
    def total(self) -> int:
        """The predicted peak of resident memory."""
        return self.interpreter + self.dense + self.kv_cache + self.work + self.pool

    @property
    def headroom(self) -> int:
        """What the budget leaves free, the reserve for page tables and allocator slack included."""
        return self.ram - self.total

    @property
    def on_disk(self) -> int:
        """Bytes of the expert records that neither a GPU nor the pool has room for."""
        return self.expert_total * (self.host_records - self.slots) // self.num_records

    @property
    def host_records(self) -> int:
        """Experts that lie on no GPU: those that the pool serves."""
        return sum(where in ("ram", "disk") for row in self.placement for where in row)

    @property
    def expert_total(self) -> int:
        return sum(self.expert_bytes.values())

    @property
    def smallest(self) -> int:
        """The smallest budget that this model and context run in."""
        least = min(MIN_SLOTS, self.num_records) * self.slot_bytes
        return _with_reserve(self.total - self.pool + least)

    def to_json(self) -> dict[str, Any]:
        derived = ("pool", "total", "headroom", "on_disk", "smallest")
        return {"schema": "qmix-plan-1", **asdict(self), **{name: getattr(self, name) for name in derived}}


def make_plan(
    layout: StoreLayout, ram: int, context: int, interpreter: int, attention: str = "sdpa", batch: int = 1
) -> Plan:
    """The plan of a store under `ram` bytes, for `batch` sequences of `context` tokens decoded together.

    Raises DoesNotFitError with the smallest budget that works.
    """
    geometry = layout.geometry
    fixed = Plan(
        ram=ram,
        context=context,
        batch=batch,
        interpreter=interpreter,
        dense=layout.dense.size - len(layout.dense.header),
        kv_cache=geometry.kv_bytes_per_token * context * batch,
        work=work_bytes(geometry, context, attention, batch),
        slots=0,
        slot_bytes=layout.slot_bytes,
        num_records=geometry.num_records,
        expert_bytes=layout.expert_bytes,
        store_bytes=layout.total_bytes,
        layer_devices=("cpu",) * geometry.num_layers,
        placement=host_placement(even_use(geometry), 0),
    )
    if ram < fixed.smallest:
        raise DoesNotFitError(_refusal(fixed), fixed.smallest)
    room = int((ram - RESERVE_BYTES) / (1 + RESERVE_SHARE)) - fixed.total
    slots = max(min(MIN_SLOTS, fixed.num_records), min(fixed.num_records, room // fixed.slot_bytes))
    return replace(fixed, slots=slots, placement=host_placement(even_use(geometry), slots))


def default_context(geometry: Geometry) -> int:
    return min(DEFAULT_CONTEXT, geometry.max_position)


def work_bytes(geometry: Geometry, context: int, attention: str, batch: int = 1) -> int:
    """The most that one step allocates besides weights and cache: a prefill chunk's activations.

    Counted from transformers' Mixtral as it is: RMSNorm works in fp32, rotary makes four tensors the size of q,
    the mask is [1, 1, T, context] and is turned into numbers to add, eager attention repeats keys and values for
    every query head and keeps scores in half and twice in fp32.
    """
    tokens = min(max(PREFILL_CHUNK, batch), context * batch)
    hidden, q_rows = geometry.hidden_size, geometry.num_heads * geometry.head_dim
    kept = tokens * hidden * HALF_BYTES * 3  # residual, normed input, output
    norm = tokens * hidden * 4 * 3
    rotary = tokens * q_rows * HALF_BYTES * 6
    mask = tokens * context * (1 + HALF_BYTES)
    if attention == "eager":
        repeated = 2 * context * q_rows * HALF_BYTES * batch
        scores = geometry.num_heads * tokens * context * (HALF_BYTES + 4 + 4) + repeated  # softmax in fp32
    else:
        scores = tokens * q_rows * (HALF_BYTES + 4)
    routed = tokens * geometry.experts_per_token * hidden * (HALF_BYTES + 4)
    expert = tokens * geometry.intermediate_size * HALF_BYTES * 3 + tokens * hidden * HALF_BYTES * 2
    step = kept + max(norm, rotary + mask + scores, routed + expert + SLOW_PATH_BYTES)
    logits = geometry.vocab_size * 40 * batch  # scores, probabilities, and their sorted copies with indices
    lookahead = geometry.num_layers * hidden * (geometry.num_experts * 4 + HALF_BYTES)  # gates, once more in fp32
    return max(step, kept + logits) + lookahead


def _with_reserve(needed: int) -> int:
    return math.ceil(needed * (1 + RESERVE_SHARE)) + RESERVE_BYTES


def _refusal(fixed: Plan) -> str:
    least = min(MIN_SLOTS, fixed.num_records)
    return (
        f"does not fit {format_bytes(fixed.ram)} of RAM: needs {format_bytes(fixed.smallest)} "
        f"(Python {format_bytes(fixed.interpreter)}, dense weights {format_bytes(fixed.dense)}, "
        f"KV cache for {fixed.batch * fixed.context} tokens {format_bytes(fixed.kv_cache)}, "
        f"work space {format_bytes(fixed.work)}, "
        f"{least} experts {format_bytes(least * fixed.slot_bytes)}); the smallest budget that works is "
        f"--ram {math.ceil(fixed.smallest / 2**20)}MiB"
    )
