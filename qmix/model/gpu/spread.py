"""Spread a model over GPUs and the host by a plan: the device of each part, and the hooks that carry a step across.

accelerate's AlignDevicesHook brings a step's inputs to the first device. Between devices it would copy what all layers
share (mask, rotary tables, positions) once for every layer. Here each device gets it once a step, and the hidden
states cross where the device changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import send_to_device
from torch import nn
from transformers import MixtralForCausalLM

from qmix.errors import UsageError
from qmix.machine.rates import Rates
from qmix.model.gpu.devices import HOST, Device, open_devices
from qmix.model.gpu.experts import DeviceExperts, Loader, read_numbers
from qmix.model.gpu.kernels import Kernels, find_kernels
from qmix.plan import Plan
from qmix.plan.device_memory import torch_bytes
from qmix.pool.eviction import Key
from qmix.pool.protocol import Pool

UNPINNED_SHARE = 0.35  # of a link's rate from pinned memory, where the driver copies by way of its own buffer
SHARED = ("attention_mask", "position_ids", "position_embeddings")  # transformers gives these to every layer


class Spread:
    """The device of each part of a model by a plan. `devices` are the plan's by name, and the host."""

    def __init__(
        self,
        plan: Plan,
        devices: dict[str, Device],
        rates: Rates,
        read_routing: Callable[[torch.Tensor], list[list[int]]] = read_numbers,
    ) -> None:
        self.plan, self.devices, self.rates, self.read_routing = plan, devices, rates, read_routing
        self.kernels: Kernels | None = None  # of the GPUs, once the model is known
        self.dense_from: Mapping[str, int] = {}  # as measured, see `Loader`
        _check(plan)

    @property
    def layers(self) -> list[Device]:
        """The device of each layer."""
        return [self.devices[name] for name in self.plan.layer_devices]

    @property
    def cards(self) -> list[str]:
        """The GPUs' names as their driver gives them; empty where the CPU stands in for them."""
        gpus = [device.device for device in self.devices.values() if device.device.type == "cuda"]
        return [torch.cuda.get_device_name(gpu) for gpu in gpus]

    @property
    def residents(self) -> frozenset[Key]:
        """(layer, expert) of all residents of GPUs."""
        return frozenset(residents(self.plan))

    def hold_to_budgets(self) -> None:
        """Hold torch to the plan's budgets on its GPUs, until `let_go`."""
        for gpu in self.plan.devices:
            self.devices[gpu.name].limit(torch_bytes(gpu.budget, gpu.cuda))

    def let_go(self) -> None:
        """Take the limits of `hold_to_budgets` away."""
        for device in self.devices.values():
            device.limit(None)

    def copy_unpinned(self) -> None:
        """Count with slower copies, because the system refuses to pin the pool."""
        self.rates = replace(self.rates, pcie=UNPINNED_SHARE * self.rates.pcie)

    def of_tensor(self, name: str) -> Device:
        """Return the device of a dense weight by its published name: the ends lie with the first and the last layer."""
        if name.startswith("model.layers."):
            return self.layers[int(name.split(".")[2])]
        return self.layers[0 if name == "model.embed_tokens.weight" else -1]

    def put_experts(
        self, model: MixtralForCausalLM, pool: Pool, activation: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Replace transformers' experts of layers on GPUs; residents are loaded through the pool."""
        gpus = [device.device for device in dict.fromkeys(self.layers) if device.name != HOST]
        self.kernels = find_kernels(pool.store.layout, self.plan.context, model.config, gpus)
        by_layer = self._load(pool)
        loaders: dict[str, Loader] = {}
        for index, (layer, device) in enumerate(zip(model.model.layers, self.layers, strict=True)):
            if device.name == HOST:
                continue
            if device.name not in loaders:
                uploads = self._uploads(device)
                loaders[device.name] = Loader(device, pool, uploads, self.kernels, self.dense_from)
            layer.mlp.experts = DeviceExperts(
                index,
                device,
                by_layer.get(index, {}),
                pool,
                activation,
                loaders[device.name],
                self.rates,
                self.read_routing,
            )

        if pool.holds_all:  # records stay in their slots while they are copied
            made = [layer.mlp.experts for layer in model.model.layers if isinstance(layer.mlp.experts, DeviceExperts)]
            for before, after in pairwise(made):
                before.following = after if after.loader is before.loader else None

    def _uploads(self, device: Device) -> bool:
        """Return True if some expert of the device's layers lies elsewhere."""
        rows = zip(self.plan.layer_devices, self.plan.placement, strict=True)
        return any(where != device.name for home, row in rows if home == device.name for where in row)

    def _load(self, pool: Pool) -> dict[int, dict[int, torch.Tensor]]:
        """Read and copy the residents' records one by one, into one block of memory on each GPU."""
        layout = pool.store.layout
        totals = dict.fromkeys(self.devices, 0)
        for layer, expert in residents(self.plan):
            totals[self.plan.placement[layer][expert]] += layout.record(layer, expert).nbytes
        blocks = {name: self.devices[name].empty(total) for name, total in totals.items() if total}
        found: dict[int, dict[int, torch.Tensor]] = {}
        used = dict.fromkeys(blocks, 0)
        for (layer, expert), record in pool.pass_through(residents(self.plan)):
            name = self.plan.placement[layer][expert]
            place = blocks[name][used[name] : used[name] + len(record)]
            used[name] += len(record)
            place.copy_(record)
            self.devices[name].wait()  # the record's slot is given to another from here on
            found.setdefault(layer, {})[expert] = place
        return found

    def connect(self, model: MixtralForCausalLM) -> None:
        """Add the hooks that carry a step across devices; the model's inputs may lie on any device.

        Turns cuDNN's attention off in this process: it makes a plan for each new length of the KV cache, 2 ms a call
        on an H100, and in decode every token has a new length. torch's other kernels take any length.
        """
        torch.backends.cuda.enable_cudnn_sdp(False)
        first, last = self.layers[0], self.layers[-1]
        if model.config.tie_word_embeddings and first is not last:
            model.lm_head.weight = nn.Parameter(last.upload(model.model.embed_tokens.weight), requires_grad=False)
        add_hook_to_module(model.model, AlignDevicesHook(first.device, skip_keys=["cache", "past_key_values"]))
        model.model.rotary_emb.to(first.device)
        copies = StepCopies()
        for layer, device in zip(model.model.layers, self.layers, strict=True):
            if device.device != first.device:
                layer.register_forward_pre_hook(_crossing(device, copies), with_kwargs=True)
        model.model.register_forward_hook(lambda *_: copies.clear())


class StepCopies:
    """Copies of what all layers of a step share, one on each device that needs it."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, str], tuple[Any, Any]] = {}  # the original too: an id is unique only while it lives

    def of(self, value: Any, device: Device) -> Any:
        """Return `value` on a device."""
        key = id(value), device.name
        if key not in self._kept:
            self._kept[key] = value, send_to_device(value, device.device)
        return self._kept[key][1]

    def clear(self) -> None:
        """Forget the copies at the end of a step."""
        self._kept.clear()


def _crossing(device: Device, copies: StepCopies) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return a pre-forward hook that moves a layer's inputs to its device."""

    def cross(
        layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden, *rest = args
        shared = {name: copies.of(kwargs[name], device) for name in SHARED if kwargs.get(name) is not None}
        return (hidden.to(device.device), *rest), kwargs | shared

    return cross


def spread_for(plan: Plan, rates: Rates, kind: str) -> Spread | None:
    """Return the spread of a plan with GPUs, torch held to its budgets; None for the host alone.

    Raises UsageError where a GPU is missing.
    """
    if not plan.devices:
        return None
    spread = Spread(plan, open_devices([gpu.name for gpu in plan.devices], kind), rates)
    spread.hold_to_budgets()
    return spread


def residents(plan: Plan) -> list[Key]:
    """Return (layer, expert) of all residents of a plan's GPUs, in a store's order."""
    rows = enumerate(plan.placement)
    return [(layer, expert) for layer, row in rows for expert, where in enumerate(row) if where.startswith("gpu:")]


def _check(plan: Plan) -> None:
    """Raise UsageError where an expert lies on another GPU than its layer."""
    for layer, expert in residents(plan):
        where, near = plan.placement[layer][expert], plan.layer_devices[layer]
        if where != near:
            raise UsageError(
                f"plan: expert {expert} of layer {layer} is on {where} and its layer on {near}; make the plan anew"
            )
