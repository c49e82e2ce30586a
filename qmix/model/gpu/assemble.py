"""Put together the captured steps of a model that lies on GPUs by a plan."""

from __future__ import annotations

import torch
from transformers import MixtralForCausalLM

from qmix.kernels.gpu.shapes import ExpertShape
from qmix.model.gpu.away import AwayExperts, Exchange, may_copy
from qmix.model.gpu.captured import OnDevice
from qmix.model.gpu.copy_or_compute import copied_share
from qmix.model.gpu.devices import HOST, Device
from qmix.model.gpu.experts import DeviceExperts, expert_size
from qmix.model.gpu.graphs import Recorder
from qmix.model.gpu.kernels import Kernels, expert_shapes
from qmix.model.gpu.spread import Spread
from qmix.model.gpu.step import StepBuffers, StepEnds, StepLayer
from qmix.model.gpu.steps import Steps
from qmix.model.kv import KVCache


def make_steps(model: MixtralForCausalLM, spread: Spread, cache: KVCache, kernels: Kernels, rows: int) -> Steps:
    """Return the steps of a model over a planned cache, for up to `rows` tokens; the step of one is captured."""
    maker = _Maker(model, spread, cache, kernels, rows)
    homes = [device for device in dict.fromkeys(spread.layers) if device.name != HOST]
    return Steps(model, cache, kernels, [maker.part(device) for device in homes], rows)


class _Maker:
    """Makes the parts of a model on its GPUs."""

    def __init__(self, model: MixtralForCausalLM, spread: Spread, cache: KVCache, kernels: Kernels, rows: int) -> None:
        self.model, self.spread, self.cache, self.kernels, self.rows = model, spread, cache, kernels, rows
        self.layout = model.pool.store.layout
        self.shapes = expert_shapes(self.layout)

    def part(self, device: Device) -> OnDevice:
        """Return a GPU's part."""
        mine = [index for index, home in enumerate(self.spread.layers) if home is device]
        staged = {shape: self._table(device, {}) for shape in self._copied_shapes(mine)}
        layers = [self._layer(index, device, staged) for index in mine]
        away = [self._away(index) if layer.elsewhere else None for index, layer in zip(mine, layers, strict=True)]
        ends = self._ends(mine)
        buffers = StepBuffers(self.layout.geometry, self.rows, self._rotary(device), ends.head is not None)
        exchange = self._exchange(device, staged) if any(away) else None
        return OnDevice(device, mine[0], layers, away, ends, buffers, staged, exchange, Recorder(device.device))

    def _experts(self, index: int) -> DeviceExperts:
        experts = self.model.model.layers[index].mlp.experts
        assert isinstance(experts, DeviceExperts)
        return experts

    def _layer(self, index: int, device: Device, staged: dict[ExpertShape, torch.Tensor]) -> StepLayer:
        layer, experts, kept = self.model.model.layers[index], self._experts(index), self.cache.layers[index]
        attention, precisions = layer.self_attn, experts.precisions
        address = {expert: self.kernels.address(record) for expert, record in experts.residents.items()}
        count = self.layout.geometry.num_experts
        tables = [
            (
                self.shapes[precision],
                self._table(device, {each: at for each, at in address.items() if precisions[each] == precision}),
            )
            for precision in dict.fromkeys(precisions[expert] for expert in address)
        ]
        others = dict.fromkeys(self.shapes[precisions[each]] for each in range(count) if each not in address)
        return StepLayer(
            norm=layer.input_layernorm.weight,
            qkv=_adjacent(device.device, attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight),
            output=attention.o_proj.weight,
            post_norm=layer.post_attention_layernorm.weight,
            gate=layer.mlp.gate.weight,
            keys=kept.keys,
            values=kept.values,
            tables=tuple(tables),
            here=self._table(device, address),
            staged=tuple(shape for shape in others if shape in staged),
            elsewhere=len(address) < count,
        )

    def _table(self, device: Device, addresses: dict[int, int]) -> torch.Tensor:
        """Return [E] addresses on a device, 0 for experts without one."""
        table = [addresses.get(expert, 0) for expert in range(self.layout.geometry.num_experts)]
        return device.upload(torch.tensor(table))

    def _copied_shapes(self, layers: list[int]) -> list[ExpertShape]:
        """Return the shapes of experts that a step may copy to these layers' GPU."""
        experts = self._experts(layers[0])
        if not may_copy(experts.pool) or experts.loader.staging is None:
            return []
        every, found = self.layout.geometry.num_experts, []
        for precision, shape in self.shapes.items():
            size = expert_size(self.layout, precision)
            cases = ([tokens] * count for count in range(1, every + 1) for tokens in (1, self.rows))
            if any(copied_share(size, case, self.spread.rates, 1) for case in cases):
                found.append(shape)
        return found

    def _away(self, index: int) -> AwayExperts:
        experts = self._experts(index)
        return AwayExperts(experts, self.shapes, self.spread.rates, self.kernels)

    def _ends(self, mine: list[int]) -> StepEnds:
        inner, last = self.model.model, self.layout.geometry.num_layers - 1
        return StepEnds(
            embed=inner.embed_tokens.weight if mine[0] == 0 else None,
            norm=inner.norm.weight if mine[-1] == last else None,
            head=self.model.lm_head.weight if mine[-1] == last else None,
        )

    def _rotary(self, device: Device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines [N, D / 2] as transformers rounds them."""
        rotary, weight = self.model.model.rotary_emb, self.model.lm_head.weight
        where = rotary.inv_freq.device
        positions = torch.arange(self.cache.capacity, device=where)[None]
        found = rotary(torch.empty(1, dtype=weight.dtype, device=where), positions)
        half = self.layout.geometry.head_dim // 2
        cos, sin = (device.upload(table[0, :, :half].contiguous()) for table in found)
        return cos, sin

    def _exchange(self, device: Device, staged: dict[ExpertShape, torch.Tensor]) -> Exchange:
        geometry, dtype = self.layout.geometry, self.model.lm_head.weight.dtype
        top_k = geometry.experts_per_token
        return Exchange(
            ids=device.pinned(self.rows, top_k, dtype=torch.int64),
            x=device.pinned(self.rows, geometry.hidden_size, dtype=dtype),
            results=device.pinned(self.rows * top_k, geometry.hidden_size, dtype=dtype),
            staged={shape: device.pinned(geometry.num_experts, dtype=torch.int64) for shape in staged},
        )


def _adjacent(device: torch.device, *weights: torch.Tensor) -> torch.Tensor:
    """Return matrices that lie one after another in one block of memory on `device` as one."""
    first, at = weights[0], weights[0].storage_offset()
    for weight in weights:
        if weight.device != device:
            raise RuntimeError(f"weights of one product lie on {device} and {weight.device}")
        if weight.dtype != first.dtype:
            raise RuntimeError(f"weights of one product are in {first.dtype} and {weight.dtype}")
        assert weight.storage_offset() == at
        at += weight.numel()
    rows, columns = sum(map(len, weights)), first.shape[1]
    return first.detach().as_strided((rows, columns), (columns, 1))
