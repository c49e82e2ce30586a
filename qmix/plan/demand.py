"""The needs of a run, and an arrangement of its layers and experts on a machine. Loads no torch.

Experts are ranked by expected use, 0 the most used; a tier's experts are given as ranks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

from qmix.geometry import HALF_BYTES, Geometry
from qmix.plan.device_memory import DEVICE_PREFILL_SHARE, device_record_bytes
from qmix.plan.memory import PREFILL_CHUNK, layer_kv_bytes, prefill_tokens, step_tokens
from qmix.plan.plan import DevicePlan
from qmix.store.expert_frequency import ExpertFrequency, by_frequency
from qmix.store.layout import StoreLayout


@dataclass(frozen=True)
class Demand:
    """A store, `batch` sequences of `context` tokens, and how often each expert is used."""

    layout: StoreLayout
    context: int
    batch: int
    attention: str
    use: ExpertFrequency

    @property
    def geometry(self) -> Geometry:
        return self.layout.geometry

    @property
    def chunk(self) -> int:
        """The most tokens of one step."""
        return step_tokens(self.context, self.batch)

    def device_prefill(self, budget: int) -> int:
        """Return how many tokens of a prompt go through a layer together on a GPU, if all layers are on GPUs."""
        if self.batch > 1:
            return PREFILL_CHUNK
        return prefill_tokens(self.geometry, self.context, int(budget * DEVICE_PREFILL_SHARE))

    @cached_property
    def layer_dense(self) -> int:
        """Bytes of one layer's dense weights."""
        return sum(
            info.nbytes for name, info in self.layout.dense.tensors.items() if name.startswith("model.layers.0.")
        )

    @cached_property
    def embeddings(self) -> int:
        """Bytes of the embeddings."""
        return self.layout.dense.tensors["model.embed_tokens.weight"].nbytes

    @cached_property
    def head(self) -> int:
        """Bytes of the last norm and the head; a tied head counts as if it were a weight of its own."""
        norm = self.layout.dense.tensors["model.norm.weight"].nbytes
        return norm + self.geometry.vocab_size * self.geometry.hidden_size * HALF_BYTES

    @cached_property
    def layer_kv(self) -> int:
        """Bytes of one layer's KV cache."""
        return layer_kv_bytes(self.geometry, self.context * self.batch)

    @cached_property
    def order(self) -> list[tuple[int, int]]:
        """(layer, expert) of each rank."""
        return by_frequency(self.layout, self.use)

    @cached_property
    def record_bytes(self) -> list[int]:
        """Bytes of the record of each rank."""
        return [self.layout.record(*key).nbytes for key in self.order]

    @cached_property
    def layers(self) -> list[int]:
        """The layer of each rank."""
        return [layer for layer, _ in self.order]

    @cached_property
    def device_bytes(self) -> dict[str, int]:
        """Bytes of one expert resident on a GPU, by precision."""
        precisions = self.layout.records
        return {name: device_record_bytes(self.geometry, name, self.layout.dtype) for name in precisions}

    @cached_property
    def expert_total(self) -> int:
        """Bytes of all records."""
        return sum(self.layout.expert_bytes.values())

    @cached_property
    def four_bit(self) -> bool:
        """True if at least half of the experts' bytes are 4-bit codes."""
        sizes = self.layout.expert_bytes
        return 2 * (sizes.get("nf4", 0) + sizes.get("fp4", 0)) >= self.expert_total

    def dense_of(self, first: int, last: int) -> int:
        """Return the bytes of the dense weights that lie with layers [first, last)."""
        if first == last:
            return 0
        layers, ends = self.geometry.num_layers, 0
        if first == 0:
            ends += self.embeddings
        if last == layers and not (self.geometry.tie_embeddings and first == 0):
            ends += self.head
        return (last - first) * self.layer_dense + ends

    def read_of(self, first: int, last: int, position: int) -> int:
        """Return the bytes of dense weights and cache that a decode step reads for layers [first, last)."""
        head = self.head if first < last == self.geometry.num_layers else 0
        return (last - first) * (self.layer_dense + self.layer_kv * position // self.context) + head


@dataclass(frozen=True, slots=True)
class Holding:
    """Layers [first, last) on one GPU, with their experts of rank `limit` and below; its bytes are in `plan`."""

    first: int
    last: int
    plan: DevicePlan
    limit: int


@dataclass(frozen=True)
class Arrangement:
    """Layers [0, cpu_layers) on the CPU, the others on GPUs that hold some of their experts.

    `slots` are the pool's, for all other experts, by the bytes of their records.
    """

    cpu_layers: int
    holdings: tuple[Holding, ...]
    slots: Mapping[int, int]
    demand: Demand

    @property
    def layer_devices(self) -> tuple[str, ...]:
        """The device of each layer."""
        names = ["cpu"] * self.demand.geometry.num_layers
        for held in self.holdings:
            names[held.first : held.last] = [held.plan.name] * (held.last - held.first)
        return tuple(names)

    @property
    def placement(self) -> tuple[tuple[str, ...], ...]:
        """[layer][expert]: a GPU's name, "ram" or "disk"."""
        geometry, devices = self.demand.geometry, self.layer_devices
        table = [["ram"] * geometry.num_experts for _ in range(geometry.num_layers)]
        for rank in self.residents:
            layer, expert = self.demand.order[rank]
            table[layer][expert] = devices[layer]
        for rank in self.missed:
            layer, expert = self.demand.order[rank]
            table[layer][expert] = "disk"
        return tuple(map(tuple, table))

    @cached_property
    def residents(self) -> list[int]:
        """Ranks of the experts on a GPU."""
        limits = self._limits
        return [rank for rank, layer in enumerate(self.demand.layers) if rank <= limits[layer]]

    @cached_property
    def elsewhere(self) -> list[int]:
        """Ranks of the experts on no GPU."""
        limits = self._limits
        return [rank for rank, layer in enumerate(self.demand.layers) if rank > limits[layer]]

    @cached_property
    def wanted(self) -> list[int]:
        """Bytes of the records of the experts on no GPU."""
        return list(map(self.demand.record_bytes.__getitem__, self.elsewhere))

    @cached_property
    def missed(self) -> list[int]:
        """Ranks of the experts on no GPU and without a slot, when the most used have taken the slots of their size."""
        left, found = dict(self.slots), []
        for rank, nbytes in zip(self.elsewhere, self.wanted, strict=True):
            if left[nbytes]:
                left[nbytes] -= 1
            else:
                found.append(rank)
        return found

    @property
    def _limits(self) -> list[int]:
        """The last rank on each layer's GPU."""
        limits = [-1] * self.demand.geometry.num_layers
        for held in self.holdings:
            limits[held.first : held.last] = [held.limit] * (held.last - held.first)
        return limits


@dataclass(frozen=True)
class StepUse:
    """A step's use of experts, by rank: the chance of each, and the expected bytes of its record.

    `by_layer` has for each layer its experts' ranks, and the sums of bytes and of chances of the first, the first two
    and so on. `device_layers` keeps what `qmix.plan.device_work` works out from them.
    """

    chance: list[float]
    record: list[float]
    by_layer: list[tuple[list[int], list[float], list[float]]]
    device_layers: dict[tuple[int, int, int, bool, int], Any] = field(default_factory=dict)

    @classmethod
    def of(cls, demand: Demand, tokens: int) -> StepUse:
        """Return the use of a step whose `tokens` tokens are routed independently."""
        precisions, records = demand.layout.precisions, demand.layout.records
        chance, record = [], []
        ranks: list[list[int]] = [[] for _ in range(demand.geometry.num_layers)]
        for rank, (layer, expert) in enumerate(demand.order):
            chance.append(1 - (1 - min(1.0, demand.use[layer][expert])) ** tokens)
            record.append(chance[-1] * records[precisions[layer][expert]].nbytes)
            ranks[layer].append(rank)
        sums = [
            (mine, list(accumulate(map(record.__getitem__, mine))), list(accumulate(map(chance.__getitem__, mine))))
            for mine in ranks
        ]
        return cls(chance, record, sums)

    def up_to(self, layer: int, limit: int) -> tuple[float, float, int]:
        """Return the bytes, the expected number and the count of a layer's experts of rank `limit` and below."""
        ranks, nbytes, used = self.by_layer[layer]
        count = bisect_right(ranks, limit)
        return (nbytes[count - 1], used[count - 1], count) if count else (0.0, 0.0, 0)
