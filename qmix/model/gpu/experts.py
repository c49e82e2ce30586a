"""The mixture's forward of a layer on a GPU, whose experts lie there, in main memory, or on the disk.

Residents are multiplied on the GPU. The machine's rates and the tokens of this step decide the faster way for the
others. Either they are computed on the CPU, with one download of x and one upload of the results; or they are copied
to the GPU, each while the one before computes. Either way missing records are read from the disk meanwhile.

The way of an expert changes its result only by the rounding of another kernel: results are added in router order, as
on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from qmix.checkpoint.torch_dtypes import HALF
from qmix.kernels.gpu.shapes import DENSE_FROM, MOST_IN_PLACE, ExpertShape
from qmix.machine.rates import Rates
from qmix.model.gpu.copy_or_compute import ExpertSize, copying_pays
from qmix.model.gpu.devices import HOST, Device, Staged, Staging, download
from qmix.model.gpu.kernels import expert_shapes
from qmix.model.gpu.matrices import code_values, device_expert, is_dequantised
from qmix.model.gradients import Activation, Forward, differentiable, one_by_one
from qmix.model.refusals import PoolExperts
from qmix.plan.device_memory import STAGED_RECORDS, dequantised_bytes
from qmix.plan.memory import PREFILL_CHUNK
from qmix.pool.eviction import Key
from qmix.pool.prefetch import Prefetcher
from qmix.pool.protocol import Pool
from qmix.precision.expert import Expert
from qmix.store.layout import StoreLayout

MANY = PREFILL_CHUNK // 4  # tokens from which nearly every expert of the next layer will be needed


def read_numbers(top_k_index: torch.Tensor) -> list[list[int]]:
    """Return [T, k] as Python lists; waits for the device."""
    numbers: list[list[int]] = top_k_index.tolist()
    return numbers


class TokensByExpert:
    """The tokens of each expert in one step: T * k pairs of a token and one of its experts, numbered token by token."""

    def __init__(self, chosen: list[list[int]]) -> None:
        """`chosen` [T][k] names the experts of each token."""
        flat = [expert for row in chosen for expert in row]
        self.order = sorted(range(len(flat)), key=flat.__getitem__)  # pairs sorted by expert
        self.spans: dict[int, slice] = {}  # an expert's part of the order
        for start, pair in enumerate(self.order):
            first = self.spans.get(flat[pair], slice(start, start)).start
            self.spans[flat[pair]] = slice(first, start + 1)

    def pairs(self, expert: int) -> list[int]:
        """Return the pairs of an expert."""
        return self.order[self.spans[expert]]

    def count(self, expert: int) -> int:
        """Return the number of tokens routed to an expert."""
        return self.spans[expert].stop - self.spans[expert].start


class Rows:
    """x [T, H] on a device, with the rows of each expert."""

    def __init__(self, hidden: torch.Tensor, routing: TokensByExpert, top_k: int, device: Device) -> None:
        self.hidden, self.routing, self.top_k = hidden, routing, top_k
        self.pairs = device.upload(torch.tensor(routing.order)) if len(hidden) > 1 else None

    def pieces(self, expert: int) -> Iterator[slice]:
        """Yield the parts of the order of pairs that are an expert's, at most a chunk of tokens each."""
        span = self.routing.spans[expert]
        for start in range(span.start, span.stop, PREFILL_CHUNK):
            yield slice(start, min(start + PREFILL_CHUNK, span.stop))

    def of(self, piece: slice) -> torch.Tensor:
        """Return the rows of x of some pairs."""
        return self.hidden if self.pairs is None else self.hidden[self.pairs[piece] // self.top_k]

    def put(self, outputs: torch.Tensor, piece: slice, result: torch.Tensor) -> None:
        """Write the results of some pairs to their places in outputs [T * k, H]."""
        if self.pairs is None:
            outputs[self.routing.order[piece.start]] = result[0]
        else:
            outputs.index_copy_(0, self.pairs[piece], result)


class KernelExpert:
    """An expert on a GPU in 4 bits: few tokens multiply it in place, many by way of `buffer`.

    From `dense_from` tokens on its matrices are dequantised there, one after another, and torch multiplies.
    """

    def __init__(
        self, kernels: Any, shape: ExpertShape, record: torch.Tensor, buffer: torch.Tensor, dense_from: int
    ) -> None:
        self.kernels, self.shape, self.record, self.buffer = kernels, shape, record, buffer
        self.dense_from = min(dense_from, MOST_IN_PLACE + 1)

    def __call__(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        """Return the expert's output [T, H] for x [T, H]; `activation` is SiLU wherever there are kernels."""
        x = x.contiguous()
        with torch.cuda.device_of(x):  # Triton launches on the current device
            found: torch.Tensor
            if len(x) < self.dense_from:
                found = self.kernels.in_place(self.shape, self.record, x)
            else:
                found = self.kernels.dense(self.shape, self.record, x, self.buffer)
        return found


class Loader:
    """A device's memory to multiply records with, which its layers share, and where needed staging buffers."""

    def __init__(
        self,
        device: Device,
        pool: Pool,
        uploads: bool,
        kernels: Any = None,
        dense_from: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """With `uploads` some experts of the device's layers lie elsewhere. `kernels` are the GPU's, if it has any.

        `dense_from` has by precision the tokens from which on dequantising was measured to be faster.
        """
        self.pool, self.layout, self.kernels, self.dense_from = pool, pool.store.layout, kernels, dense_from
        self.shapes = expert_shapes(self.layout)
        self.ahead: dict[Key, Staged] = {}  # copies that a coming layer will use, in the buffers' order
        geometry, half = self.layout.geometry, HALF[self.layout.dtype]
        self.staging = Staging(device, max(self.layout.record_counts)) if uploads else None
        self.sizes = {precision: expert_size(self.layout, precision) for precision in self.layout.records}
        self.memory = device.empty(dequantised_bytes(geometry, self.layout.records)).view(half)
        self.values = code_values(self.layout.records, device.device)

    def copy(self, layer: int, expert: int, beside: Staged | None) -> Staged:
        """Begin to copy a record that the pool has in memory, unless that has begun already.

        The work with `beside` is not queued yet: its buffer is not filled.
        """
        assert self.staging is not None
        return self.ahead.pop((layer, expert), None) or self.staging.copy(self.pool.record(layer, expert), beside)

    def begin(self, keys: Sequence[Key]) -> None:
        """Begin to copy the first of these records, one to each buffer. They must stay in their slots."""
        assert self.staging is not None
        first = [key for key in keys[:STAGED_RECORDS] if self.pool.holds(*key)]
        self.ahead = {key: self.staging.copy(self.pool.record(*key)) for key in first}

    def expert(self, precision: str, record: torch.Tensor) -> Forward:
        """Return the expert of a record's bytes on the device; valid until the next call."""
        if self.kernels is not None and is_dequantised(precision):
            tokens = self.dense_from.get(precision, DENSE_FROM)
            return KernelExpert(self.kernels, self.shapes[precision], record, self.memory, tokens)
        layout, shapes = self.layout.records[precision], self.layout.geometry.expert_matrices
        return device_expert(record, layout, shapes, self.memory, self.values.get(precision))


def expert_size(layout: StoreLayout, precision: str) -> ExpertSize:
    """Return the sizes of an expert in some precision."""
    weights = sum(rows * cols for rows, cols in layout.geometry.expert_matrices.values())
    return ExpertSize(layout.records[precision].nbytes, weights, is_dequantised(precision))


class DeviceExperts(PoolExperts):
    """Replacement of transformers' MixtralExperts for one layer on a GPU.

    `residents` are the records that lie on the device. `loader` multiplies with them, and copies others there.
    `read_routing` returns top_k_index as Python lists.
    """

    def __init__(
        self,
        layer: int,
        device: Device,
        residents: dict[int, torch.Tensor],
        pool: Pool,
        activation: Activation,
        loader: Loader,
        rates: Rates,
        read_routing: Callable[[torch.Tensor], list[list[int]]] = read_numbers,
    ) -> None:
        super().__init__(layer, pool, device.device)
        self.device, self.residents = device, residents
        self.host, self.precisions = Device(HOST, torch.device(HOST)), pool.store.layout.precisions[layer]
        self.activation, self.loader, self.rates, self.read_routing = activation, loader, rates, read_routing
        self.prefetcher: Prefetcher | None = None
        self.following: DeviceExperts | None = None  # the next layer's, where it shares the loader

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Compute [T, H] from tokens [T, H], and their experts and weights (fp32), both [T, k]."""
        if self.layer == 0:  # once a pass: it takes a microsecond
            self.check_caller()
        return self.mix(hidden_states, self.read_routing(top_k_index), top_k_weights)

    def mix(self, hidden_states: torch.Tensor, chosen: list[list[int]], weights: torch.Tensor) -> torch.Tensor:
        """Compute the same for any number of tokens whose experts [T][k] are known to Python.

        Each expert is copied once at most, and with more than a chunk of tokens always. These take no more work space
        than a chunk beside the results.
        """
        tokens, top_k = weights.shape
        routing = TokensByExpert(chosen)
        outputs = hidden_states.new_empty(tokens * top_k, hidden_states.shape[-1])
        away = [expert for expert in routing.spans if expert not in self.residents]
        # the host has work space for a chunk
        copying = bool(away) and (tokens > PREFILL_CHUNK or self._copying_pays(away, routing))
        # x is downloaded before any work is queued on the GPU: the copy would wait for that work
        below = download(hidden_states) if away and not copying else hidden_states
        away.sort(key=lambda expert: (self.layer, expert) not in self.loader.ahead)  # in the buffers' order
        records = self.records(list(routing.spans), away, below)
        rows = Rows(hidden_states, routing, top_k, self.device)
        for expert in routing.spans:
            if expert in self.residents:
                self._compute(expert, self.residents[expert], rows, outputs)
        if copying:
            self._on_device(records, rows, outputs)
        elif away:
            self._on_host(records, Rows(below, routing, top_k, self.host), outputs)
        self.loader.ahead.clear()  # an expert without tokens; its buffer will be used for others
        if copying and tokens > MANY and self.following is not None and not hidden_states.requires_grad:
            self.loader.begin(self.following.elsewhere)
        # [T, 1, k] @ [T, k, H]
        parts = zip(weights.split(PREFILL_CHUNK), outputs.view(tokens, top_k, -1).split(PREFILL_CHUNK), strict=True)
        sums = [torch.bmm(w.unsqueeze(1), y.float()).squeeze(1).to(hidden_states.dtype) for w, y in parts]
        return sums[0] if len(sums) == 1 else torch.cat(sums)

    @property
    def elsewhere(self) -> list[Key]:
        """The experts of this layer that are not resident."""
        return [(self.layer, expert) for expert in range(len(self.precisions)) if expert not in self.residents]

    def _copying_pays(self, away: Sequence[int], routing: TokensByExpert) -> bool:
        largest = max((self.loader.sizes[self.precisions[expert]] for expert in away), key=lambda size: size.record)
        tokens = [routing.count(expert) for expert in away]
        return copying_pays(largest, tokens, self.pool.store.geometry.hidden_size, self.rates)

    def records(self, chosen: list[int], away: list[int], hidden: torch.Tensor) -> Iterator[tuple[int, Expert]]:
        """Return the experts of `away` from the pool, and begin to read what later layers will probably need."""
        if hidden.requires_grad:
            return one_by_one(self.pool, self.layer, away)
        return (one for group in self.groups(chosen, away, hidden) for one in group)

    def groups(self, chosen: list[int], away: list[int], hidden: torch.Tensor) -> Iterator[list[tuple[int, Expert]]]:
        """Return the same without gradients, in lists of those that are in memory together."""
        coming: list[Key] = []
        if self.prefetcher is not None:
            self.prefetcher.chosen(self.layer, chosen)
            coming = self.prefetcher.coming(self.layer, hidden)
        if away:
            return self.pool.groups(self.layer, away, coming)
        self.pool.prefetch(self.layer, coming)
        return iter(())

    def _on_host(self, records: Iterator[tuple[int, Expert]], rows: Rows, outputs: torch.Tensor) -> None:
        """Compute experts on the CPU, and upload all results together."""
        results, pairs = [], []
        for expert, forward in records:
            results += [self._run(expert, forward, rows.of(piece)) for piece in rows.pieces(expert)]
            pairs += rows.routing.pairs(expert)
        outputs.index_copy_(0, self.device.upload(torch.tensor(pairs)), self.device.upload(torch.cat(results)))

    def _on_device(self, records: Iterator[tuple[int, Expert]], rows: Rows, outputs: torch.Tensor) -> None:
        """Copy experts and compute them, each copy beside the product before."""
        waiting: tuple[int, Staged] | None = None
        for expert, _ in records:
            staged = self.loader.copy(self.layer, expert, None if waiting is None else waiting[1])
            if waiting is not None:
                self._compute_staged(*waiting, rows, outputs)
            staged.wait()  # the slot may be given to another record when the next one is requested
            waiting = expert, staged
        if waiting is not None:
            self._compute_staged(*waiting, rows, outputs)

    def _compute_staged(self, expert: int, staged: Staged, rows: Rows, outputs: torch.Tensor) -> None:
        with staged.in_use() as record:
            self._compute(expert, record, rows, outputs)

    def _compute(self, expert: int, record: torch.Tensor, rows: Rows, outputs: torch.Tensor) -> None:
        """Compute an expert whose record lies on the device."""
        forward = self.loader.expert(self.precisions[expert], record)
        for piece in rows.pieces(expert):
            rows.put(outputs, piece, self._run(expert, forward, rows.of(piece)))

    def _run(self, expert: int, forward: Forward, x: torch.Tensor) -> torch.Tensor:
        """Return an expert's results for some rows."""
        if x.requires_grad:
            forward = differentiable(forward, self.pool, (self.layer, expert))
        return forward(x, self.activation)

    def device_tensors(self) -> Iterator[torch.Tensor]:
        """Yield the residents, and the loader's memory, which layers on a device share."""
        yield from self.residents.values()
        yield self.loader.memory
        if self.loader.staging is not None:
            yield from self.loader.staging.buffers
