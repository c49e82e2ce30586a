"""A plan proved without the hardware it is for: the true model, prefill and decode, on pretend devices at full size.

The modules are those that run on real GPUs. They are made of fake tensors, which have devices but no values: torch
refuses operands on different devices, the products of experts compare theirs, and the bytes alive on each device are
counted and compared with the plan. Needs neither GPUs nor a store, and the memory of neither.
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
from qmix.model.gpu.devices import HOST, Device, open_devices
from qmix.model.gpu.experts import DeviceExperts
from qmix.model.gpu.model import spread_for
from qmix.model.kv import KVCache
from qmix.plan import PREFILL_CHUNK, Plan
from qmix.pool.experts import ExpertPool
from qmix.store.layout import StoreLayout
from qmix.store.opened import Store
from qmix.verify import pretend
from qmix.verify.alive import AliveBytes

NEVER = 1e-9  # FLOP/s of a processor that is not to be preferred
TOLERANCE = 0.03  # share of the planned bytes by which what was found may differ


class PlanError(QmixError):
    """A plan is not what running it shows."""


@dataclass(frozen=True, slots=True)
class Verified:
    """Bytes at their peak on one device, as planned and as found; on the host without Python itself."""

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
    """What running a plan on pretend devices showed; `problems` are one line each."""

    devices: tuple[Verified, ...]
    problems: tuple[str, ...]

    @property
    def holds(self) -> bool:
        return not self.problems and all(device.agrees for device in self.devices)

    def check(self) -> None:
        """Raises PlanError, which says what is wrong, where the plan does not hold."""
        wrong = [
            f"{each.name} took {each.found:,} bytes, not {each.planned:,}" for each in self.devices if not each.agrees
        ]
        if not self.holds:
            raise PlanError(f"the plan does not hold: {'; '.join([*self.problems, *wrong])}; please report this")


class Rehearsal:
    """A plan's model, cache and pool without a store's data, to be used inside the block of `rehearsal`."""

    def __init__(self, plan: Plan, layout: StoreLayout, attention: str, rates: Rates, kind: str) -> None:
        self.plan, self.layout, self.rates = plan, layout, rates
        self.store = _store(layout)
        self.model: MixtralForCausalLM = empty_model(self.store, attention)
        self.spread = spread_for(plan, rates, kind)
        self.bytes = AliveBytes({torch.ops.bitsandbytes.gemm_4bit.default: pretend.gemm_4bit})
        self.pool: ExpertPool
        self.cache: KVCache

    def load_weights(self) -> None:
        """All that is there before the first step."""
        spread = self.spread
        elsewhere = spread.residents if spread else frozenset()
        self.pool = pretend.PretendPool(self.store, self.plan.slots_by_size, elsewhere)
        host = Device(HOST, torch.device(HOST))
        dense = typed(self.store, dense_memory(self.store, spread.of_tensor if spread else lambda name: host))
        load_weights(self.model, self.store, self.pool, dense, self.spread)
        homes = [device.device for device in spread.layers] if spread else None
        dtype = HALF[self.layout.dtype]
        self.cache = KVCache(self.layout.geometry, self.plan.context, dtype, self.plan.batch, homes)

    def prefer(self, rates: Rates) -> None:
        """Let experts that lie in main memory be copied or computed there as these rates say."""
        for layer in self.model.model.layers:
            if isinstance(layer.mlp.experts, DeviceExperts):
                layer.mlp.experts.rates = rates

    def step(self, tokens: int, before: int, choose: pretend.Choose) -> None:
        """One step of so many tokens of each sequence, after `before` cached ones."""
        hooks = [
            layer.mlp.gate.register_forward_hook(pretend.given_routing(index, choose))
            for index, layer in enumerate(self.model.model.layers)
        ]
        for layer in self.cache.layers:
            layer.length = before
        ids = torch.zeros((self.plan.batch, tokens), dtype=torch.int64)
        mask = torch.ones((self.plan.batch, before + tokens), dtype=torch.int64)
        try:
            with torch.no_grad():
                logits = self.model(ids, attention_mask=mask, cache=self.cache, use_cache=True, logits_to_keep=1).logits
            logits[:, -1].to(torch.float32, copy=True).to(HOST)  # as transformers' generate takes them
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
    """Stand-ins for data and for the CPU's kernels for the time of the block, and a model on the plan's devices.

    These are pretend devices and all tensors are fake; or with `kind` torch's own, and all tensors take memory.
    """
    if kind == pretend.KIND:
        pretend.register()
    made = Rehearsal(plan, layout, attention, rates or Rates(), kind)
    with ExitStack() as stack:
        stack.enter_context(pretend.stand_ins())
        if kind == pretend.KIND:
            stack.enter_context(FakeTensorMode())
            stack.enter_context(made.bytes)
        made.load_weights()
        yield made


def verify(plan: Plan, layout: StoreLayout, attention: str = "sdpa", rates: Rates | None = None) -> Verification:
    """Run a plan's longest prefill chunk and a decode step on pretend devices, and compare.

    The chunk runs with its tokens spread over all experts, and with all of them at the same ones, the most that an
    expert can be given: such as are copied to the layer's device, and such as the CPU computes.
    """
    try:
        with rehearsal(plan, layout, attention, rates) as made:
            rehearse(made)
            problems = [f"not in half precision: {found}" for found in dict.fromkeys(made.bytes.wide)]
            problems += _wide_parts(made)
            peak = made.bytes.peak
    except RuntimeError as error:  # torch's and the products', for operands on different devices
        return Verification((), (str(error).strip().splitlines()[0],))
    rows = [Verified(device.name, device.total, peak[device.name]) for device in plan.devices]
    rows.append(Verified(HOST, plan.total - plan.interpreter, peak[HOST]))
    return Verification(tuple(rows), tuple(problems))


def verify_on_gpus(plan: Plan, layout: StoreLayout, attention: str = "sdpa") -> Verification:
    """The same on this machine's GPUs, where the weights are whatever lay in their memory; the host is not compared.

    What CUDA had allocated before is not counted. Raises UsageError where a GPU of the plan is not here.
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
    """The steps that take the most."""
    plan, geometry = made.plan, made.layout.geometry
    tokens = max(1, min(PREFILL_CHUNK // plan.batch, plan.context - 1))
    before, even = plan.context - 1 - tokens, _spread_out(geometry)
    made.step(tokens, before, even)
    made.step(1, plan.context - 1, even)
    for way in (replace(made.rates, matmul=NEVER), replace(made.rates, gpu_matmul=NEVER)):
        made.prefer(way)
        made.step(tokens, before, _together(plan, geometry.experts_per_token))


def _spread_out(geometry: Geometry) -> pretend.Choose:
    """Every expert used by as many tokens as any other."""
    count, top_k = geometry.num_experts, geometry.experts_per_token
    return lambda layer, tokens: [
        [(token * top_k + place) % count for place in range(top_k)] for token in range(tokens)
    ]


def _together(plan: Plan, top_k: int) -> pretend.Choose:
    """All tokens at the same experts of a layer, if possible at such as do not lie on its device."""

    def choose(layer: int, tokens: int) -> list[list[int]]:
        places, near = plan.placement[layer], plan.layer_devices[layer]
        experts = sorted(range(len(places)), key=lambda expert: places[expert] == near)
        return [experts[:top_k]] * tokens

    return choose


def _wide_parts(made: Rehearsal) -> list[str]:
    """Dense weights and cache that are not in the half precision of the layout."""
    dtype = HALF[made.layout.dtype]
    parts = {name: parameter.dtype for name, parameter in made.model.named_parameters()}
    parts |= {f"KV cache of layer {index}": layer.keys.dtype for index, layer in enumerate(made.cache.layers)}
    return [f"{name}: {found}, not {dtype}" for name, found in parts.items() if found != dtype]


def _store(layout: StoreLayout) -> Store:
    """A store that is nowhere: enough of one to build a model of its layout."""
    geometry = layout.geometry
    config = {key: getattr(geometry, name) for name, key in CONFIG_KEYS.items()}
    config |= {"tie_word_embeddings": geometry.tie_embeddings, "sliding_window": geometry.sliding_window}
    return Store(Path("pretend"), layout, config, "pretend", "", {}, (), {}, {})
