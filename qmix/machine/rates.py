"""A machine as figures: the sizes of its parts and their rates. Pure data; loads no torch.

Bytes, bytes/s, FLOP/s (a multiplication and an addition are two) and seconds. `qmix doctor` measures the rates of this
machine; rates that were neither measured nor stated are typical ones, and are named so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qmix.units import format_bytes, format_flops

FLOP_RATES = ("matmul", "gpu_matmul")
PRODUCTS = ("matmul", "four_bit_read", "half_read")  # of the CPU, in proportion to its threads
SECONDS = ("layer_seconds", "read_seconds")
RATE_LABELS = {
    "memory_read": "memory bandwidth",
    "disk_read": "disk reads",
    "pcie": "memory to GPU",
    "matmul": "bf16 matmul",
    "four_bit_read": "4-bit matmul bandwidth",
    "half_read": "bf16 matmul bandwidth",
    "gpu_memory": "GPU memory bandwidth",
    "gpu_matmul": "GPU matmul",
    "layer_seconds": "per-layer overhead",
    "read_seconds": "per-read overhead",
}


@dataclass(frozen=True, slots=True)
class Rates:
    """The rates of a machine. Defaults are typical of a desktop of 2024 with a GPU of the class of an RTX 4090.

    memory_read    bytes/s, reading memory with all cores
    disk_read      bytes/s, O_DIRECT reads of expert records at random places
    pcie           bytes/s, from pinned memory to one GPU
    matmul         FLOP/s of products of many tokens on the CPU: torch's in bf16, or qmix's own if faster
    four_bit_read  bytes/s of 4-bit weights multiplied with one token on the CPU, by the product alone
    half_read      bytes/s of bf16 weights multiplied with one token on the CPU, by the product alone
    gpu_memory     bytes/s, reading one GPU's memory
    gpu_matmul     FLOP/s of half-precision products on one GPU
    layer_seconds  seconds of a layer in decode besides its weights: Python, small tensors, the router
    read_seconds   seconds of a record's read besides its bytes

    `measured`, `stated` and `published` name the rates that were measured on the machine, that a user gave, and that
    follow from a vendor's figures of a card; `scaled` names rates of another number of threads. `card`
    is that card, or the one that the GPU's typical rates are of.
    """

    memory_read: float = 40e9
    disk_read: float = 3e9
    pcie: float = 20e9
    matmul: float = 800e9
    four_bit_read: float = 42e9
    half_read: float = 40e9
    gpu_memory: float = 800e9
    gpu_matmul: float = 80e12
    layer_seconds: float = 0.6e-3
    read_seconds: float = 0.3e-3
    measured: frozenset[str] = frozenset()
    stated: frozenset[str] = frozenset()
    scaled: frozenset[str] = frozenset()
    published: frozenset[str] = frozenset()
    card: str = ""

    def source(self, name: str) -> str:
        """Return the source of a rate: "stated", "measured", "scaled", "published" or "typical"."""
        kinds = ("stated", "measured", "scaled", "published")
        return next((kind for kind in kinds if name in getattr(self, kind)), "typical")

    def with_card(self, found: Mapping[str, float], card: str, named: bool) -> Rates:
        """Return the rates with those of a card in place: as published where it was `named`, else as typical ones."""
        published = self.published.union(found) if named else self.published.difference(found)
        others = {"measured": self.measured.difference(found), "published": published, "card": card}
        changes: dict[str, Any] = {**found, **others}
        return replace(self, **changes)

    def with_measured(self, found: Mapping[str, float]) -> Rates:
        """Return the rates with those of `found` in place, as measured."""
        sources = {"measured": self.measured.union(found), "stated": self.stated.difference(found)}
        changes: dict[str, Any] = {**found, **sources}
        return replace(self, **changes)

    def with_threads(self, found: Mapping[str, float], measured: int, threads: int) -> Rates:
        """Return the rates with those of `found` in place, measured with other threads: products in proportion.

        Products with one token read no faster than memory. Memory's rate and the overheads are left as they are.
        """
        rates = {name: rate * threads / measured if name in PRODUCTS else rate for name, rate in found.items()}
        for name in ("four_bit_read", "half_read"):
            if name in rates and "memory_read" in rates:
                rates[name] = min(rates[name], rates["memory_read"])
        changes: dict[str, Any] = {**rates, "scaled": self.scaled.union(rates)}
        return replace(self, **changes)

    def with_stated(self, given: Mapping[str, float]) -> Rates:
        """Return the rates with those of `given` in place, as stated."""
        changes: dict[str, Any] = {**given, "stated": self.stated.union(given)}
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """Return {name: {"value", "source"}}."""
        return {name: {"value": getattr(self, name), "source": self.source(name)} for name in RATE_NAMES}


RATE_NAMES = tuple(RATE_LABELS)

SLOW_FOUR_BIT = 20.0  # times slower to dequantise 4-bit weights and multiply one token (benchmarks/slow_path.py)


def without_kernels(rates: Rates) -> Rates:
    """Return the rates of a CPU without kernels for 4-bit weights; a measured `four_bit_read` stays."""
    if rates.source("four_bit_read") == "measured":
        return rates
    return replace(rates, four_bit_read=rates.four_bit_read / SLOW_FOUR_BIT)


@dataclass(frozen=True, slots=True)
class FourBitProducts:
    """The CPU's way to multiply packed 4-bit weights. `fast` is true if kernels do, without dequantising rows.

    `tried` is true if `qmix doctor` ran one with the installed versions; otherwise `fast` follows the CPU's flags.
    """

    fast: bool
    tried: bool = False


@dataclass(frozen=True, slots=True)
class Machine:
    """Budgets and rates for a plan.

    `ram` is the ceiling of the whole process, `gpus` that of each GPU, `disk` the free bytes for a store (None: not
    checked), all in bytes. `four_bit` is how 4-bit products are computed. `cuda` are the bytes of CUDA's context on a
    GPU, None where they were not measured.
    """

    ram: int
    gpus: tuple[int, ...] = ()
    disk: int | None = None
    rates: Rates = Rates()
    four_bit: FourBitProducts = FourBitProducts(fast=True)
    cuda: int | None = None

    @property
    def speeds(self) -> Rates:
        """The rates with the CPU's way of 4-bit products."""
        return self.rates if self.four_bit.fast else without_kernels(self.rates)

    def to_json(self) -> dict[str, Any]:
        return {
            "ram": self.ram,
            "gpus": list(self.gpus),
            "disk": self.disk,
            "cuda_context": self.cuda,
            "card": self.rates.card,
            "fast_kernels": self.four_bit.fast,
            "fast_kernels_tried": self.four_bit.tried,
            "rates": self.rates.to_json(),
        }


def rate_text(rates: Rates, name: str) -> str:
    """Return a rate with its unit."""
    value = getattr(rates, name)
    if name in SECONDS:
        return f"{1e3 * value:.2g} ms"
    return format_flops(value) if name in FLOP_RATES else f"{format_bytes(value)}/s"
