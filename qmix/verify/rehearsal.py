"""Verify a plan without its hardware: run the true model, prefill and decode, on pretend devices at full size.

The modules are the same as on real GPUs, with fake tensors, which have devices but no values. torch refuses operands on
different devices, the products of experts compare the devices of theirs, and the bytes alive on each device are counted
and compared with the plan. Needs no GPUs, no store, and no memory for either.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import MixtralForCausalLM

from qmix.checkpoint.torch_dtypes import HALF
from qmix.errors import QmixError
from qmix.geometry import CONFIG_KEYS, Geometry
from qmix.machine.rates import Rates
from qmix.model.build import empty_model, load_weights
from qmix.model.dense import dense_memory, typed
from qmix.model.gpu.assemble import make_steps
from qmix.model.gpu.devices import HOST, Device, open_devices
from qmix.model.gpu.experts import DeviceExperts
from qmix.model.gpu.kernels import takes
from qmix.model.gpu.prompt import read_on_gpus
from qmix.model.gpu.spread import spread_for
from qmix.model.gpu.steps import Steps
from qmix.model.kv import KVCache
from qmix.plan import Plan
from qmix.plan.device_memory import captured_tokens
from qmix.plan.memory import PREFILL_CHUNK
from qmix.store.layout import StoreLayout
from qmix.store.opened import Store
from qmix.verify import pretend
from qmix.verify.alive import AliveBytes
from qmix.verify.pretend_kernels import PretendKernels

NEVER = 1e-9  # FLOP/s of a processor that is never preferred
TOLERANCE = 0.03  # share of the planned bytes by which the bytes found may differ


class PlanError(QmixError):
    """A plan differs from what running it shows."""


@dataclass(frozen=True, slots=True)
class Verified:
    """Peak bytes on one device, planned and found; on the host without Python itself."""

    name: str
    planned: int
    found: int

    @property
    def difference(self) -> float:
        """Share of the planned bytes; above zero where more was found."""
        return self.found / self.planned - 1

    @property
    def agrees(self) -> bool:
        return abs(self.difference) <= TOLERANCE


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of running a plan on pretend devices; `problems` are one line each."""

    devices: tuple[Verified, ...]
    problems: tuple[str, ...]

    @property
    def holds(self) -> bool:
        return not self.problems and all(device.agrees for device in self.devices)

    def check(self) -> None:
        """Raise PlanError, which says what is wrong, where the plan does not hold."""
        wrong = [
            f"{each.name} took {each.found:,} bytes, not {each.planned:,}" for each in self.devices if not each.agrees
        ]
        if not self.holds:
            raise PlanError(f"the plan does not hold: {'; '.join([*self.problems, *wrong])}; please report this")


class Rehearsal:
    """A plan's model, cache and pool without a store's data, for use inside the block of `rehearsal`."""

    def __init__(self, plan: Plan, layout: StoreLayout, attention: str, rates: Rates, kind: str) -> None:
        self.plan, self.layout, self.rates = plan, layout, rates
        self.store = _store(layout)
        self.model: MixtralForCausalLM = empty_model(self.store, attention)
        self.spread = spread_for(plan, rates, kind)
        self.bytes = AliveBytes()
        self.kind = kind
        self.steps: Steps | None = None
        self.pool: pretend.PretendPool
        self.cache: KVCache

    @property
    def captured_tokens(self) -> int:
        """The tokens that captured steps have room for."""
        return captured_tokens(self.layout.geometry, self.plan.context, self.plan.batch)

    def load_weights(self) -> None:
        """Make the pool, the weights and the cache, as they are before the first step."""
        spread = self.spread
        elsewhere = spread.residents if spread else frozenset()
        self.pool = pretend.PretendPool(self.store, self.plan.slots_by_size, elsewhere)
        host = Device(HOST, torch.device(HOST))
        memory = dense_memory(self.store, spread.of_tensor if spread else lambda name: host, pretend.allocate)
        dense = typed(self.store, memory)
        load_weights(self.model, self.store, self.pool, dense, spread, pretend.BlindPrefetcher)
        homes = [device.device for device in spread.layers] if spread else None
        dtype, sizes = HALF[self.layout.dtype], (self.plan.context, self.plan.batch)
        self.cache = KVCache(self.layout.geometry, sizes[0], dtype, sizes[1], homes, allocate=pretend.allocate)

    def capture(self, choose: pretend.Choose) -> None:
        """Make the captured steps as a run does, over shape functions on pretend devices."""
        if self.spread is None or not takes(self.layout, self.plan.context, self.model.config):
            return
        kernels = PretendKernels() if self.kind == pretend.KIND else self.spread.kernels
        if kernels is None:
            return
        for index, layer in enumerate(self.model.model.layers):
            if isinstance(layer.mlp.experts, DeviceExperts):
                layer.mlp.experts.read_routing = pretend.read_routing(index, choose)
        self.steps = make_steps(self.model, self.spread, self.cache, kernels, self.captured_tokens)

    def captured_step(self, tokens: int, before: int, choose: pretend.Choose) -> None:
        """Run one captured step of `tokens` tokens of a sequence after `before` cached ones, if there is one."""
        if self.steps is None:
            return
        self._set_length(before)
        with torch.no_grad(), self._routed(choose):
            self.steps.step([0] * tokens, before)

    def prefer(self, rates: Rates) -> None:
        """Set the rates that decide whether experts in main memory are copied or computed on the CPU."""
        for layer in self.model.model.layers:
            if isinstance(layer.mlp.experts, DeviceExperts):
                layer.mlp.experts.rates = rates

    def step(self, tokens: int, before: int, choose: pretend.Choose) -> None:
        """Run one step of `tokens` tokens of each sequence, after `before` cached ones."""
        self._set_length(before)
        ids = torch.zeros((self.plan.batch, tokens), dtype=torch.int64)
        mask = torch.ones((self.plan.batch, before + tokens), dtype=torch.int64)
        with torch.no_grad(), self._routed(choose):
            logits = self.model(ids, attention_mask=mask, cache=self.cache, use_cache=True, logits_to_keep=1).logits
        logits[:, -1].to(torch.float32, copy=True).to(HOST)  # as transformers' generate takes them

    def prompt(self, choose: pretend.Choose) -> None:
        """Read as many tokens as go through a layer together, where these are more than a chunk."""
        if self.spread is None or self.plan.prefill == PREFILL_CHUNK:
            return
        self._set_length(0)
        tokens = [0] * min(self.plan.prefill, self.plan.context)
        with torch.no_grad(), self._routed(choose):
            read_on_gpus(self.model, self.spread, self.cache, tokens, self.plan.prefill)

    def _set_length(self, length: int) -> None:
        for layer in self.cache.layers:
            layer.length = length

    @contextmanager
    def _routed(self, choose: pretend.Choose) -> Iterator[None]:
        """Give transformers' routers their choice, because fake numbers have no order."""
        hooks = [
            layer.mlp.gate.register_forward_hook(pretend.given_routing(index, choose))
            for index, layer in enumerate(self.model.model.layers)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def rehearsal(
    plan: Plan,
    layout: StoreLayout,
    attention: str = "sdpa",
    rates: Rates | None = None,
    kind: str = pretend.KIND,
) -> Iterator[Rehearsal]:
    """Give a model on the plan's devices without a store's data.

    Devices are pretend ones and all tensors are fake inside the block. With another `kind` the devices are torch's own
    and tensors take memory.
    """
    if kind == pretend.KIND:
        pretend.register()
    made = Rehearsal(plan, layout, attention, rates or Rates(), kind)
    with ExitStack() as stack:
        if kind == pretend.KIND:
            stack.enter_context(FakeTensorMode())
            stack.enter_context(made.bytes)
        made.load_weights()
        yield made


def verify(plan: Plan, layout: StoreLayout, attention: str = "sdpa", rates: Rates | None = None) -> Verification:
    """Run a plan's longest prefill chunk and a decode step on pretend devices, and compare the bytes.

    The chunk runs with its tokens spread over all experts, and with all of them at the same experts, the most that one
    can get: once with experts copied to the layer's device, once with experts computed on the CPU.
    """
    with rehearsal(plan, layout, attention, rates) as made:
        wide, stopped = _wide_parts(made), []
        try:
            rehearse(made)
        except RuntimeError as error:  # operands on different devices or of other types
            stopped.append(str(error).strip().splitlines()[0])
    problems = (*stopped, *(f"not in half precision: {found}" for found in dict.fromkeys(made.bytes.wide)), *wide)
    if stopped:
        return Verification((), problems)
    peak = made.bytes.peak
    rows = [Verified(device.name, device.total, peak[device.name]) for device in plan.devices]
    rows.append(Verified(HOST, plan.total - plan.interpreter, peak[HOST]))
    return Verification(tuple(rows), problems)


def verify_on_gpus(plan: Plan, layout: StoreLayout, attention: str = "sdpa") -> Verification:
    """Do the same on this machine's GPUs, with weights of arbitrary content; the host is not compared.

    Bytes that CUDA had allocated before are not counted. Raises UsageError where a GPU of the plan is missing.
    """
    gpus = [open_devices([device.name for device in plan.devices])[device.name] for device in plan.devices]
    before = [gpu.allocated() for gpu in gpus]
    for gpu in gpus:
        gpu.forget_peak()
    with rehearsal(plan, layout, attention, kind="cuda") as made:
        rehearse(made)
        problems = _wide_parts(made)
    rows = [
        Verified(device.name, device.total, gpu.peak() - held)
        for device, gpu, held in zip(plan.devices, gpus, before, strict=True)
    ]
    return Verification(tuple(rows), tuple(problems))


def rehearse(made: Rehearsal) -> None:
    """Run the steps that take the most memory."""
    plan, geometry = made.plan, made.layout.geometry
    tokens = max(1, min(PREFILL_CHUNK // plan.batch, plan.context - 1))
    before, even = plan.context - 1 - tokens, _spread_out(geometry)
    made.capture(even)
    made.step(tokens, before, even)
    made.step(1, plan.context - 1, even)
    for few in (1, min(made.captured_tokens, tokens)):
        made.captured_step(few, plan.context - few, even)
    for way in (replace(made.rates, matmul=NEVER), replace(made.rates, gpu_matmul=NEVER)):
        made.prefer(way)
        made.step(tokens, before, _together(plan, geometry.experts_per_token))
        made.prompt(_together(plan, geometry.experts_per_token))


def _spread_out(geometry: Geometry) -> pretend.Choose:
    """Return a routing that uses all experts equally."""
    count, top_k = geometry.num_experts, geometry.experts_per_token
    return lambda layer, tokens: [
        [(token * top_k + place) % count for place in range(top_k)] for token in range(tokens)
    ]


def _together(plan: Plan, top_k: int) -> pretend.Choose:
    """Return a routing of all tokens to the same experts of a layer, if possible ones that lie elsewhere."""

    def choose(layer: int, tokens: int) -> list[list[int]]:
        places, near = plan.placement[layer], plan.layer_devices[layer]
        experts = sorted(range(len(places)), key=lambda expert: places[expert] == near)
        return [experts[:top_k]] * tokens

    return choose


def _wide_parts(made: Rehearsal) -> list[str]:
    """Return the dense weights and caches that are not in the half precision of the layout, a line each."""
    dtype = HALF[made.layout.dtype]
    parts = {name: parameter.dtype for name, parameter in made.model.named_parameters()}
    parts |= {f"KV cache of layer {index}": layer.keys.dtype for index, layer in enumerate(made.cache.layers)}
    return [f"{name}: {found}, not {dtype}" for name, found in parts.items() if found != dtype]


def _store(layout: StoreLayout) -> Store:
    """Return a store without files, enough to build a model of its layout."""
    geometry = layout.geometry
    config = {key: getattr(geometry, name) for name, key in CONFIG_KEYS.items()}
    config |= {"tie_word_embeddings": geometry.tie_embeddings, "sliding_window": geometry.sliding_window}
    return Store(Path("pretend"), layout, config, "pretend", "", {}, (), {}, {})
