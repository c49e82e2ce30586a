"""Keep the results of `qmix doctor` on this machine in the user's state directory. Loads no torch."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from qmix.disk.places import state_directory
from qmix.errors import QmixError
from qmix.files import read_state, write_whole
from qmix.kernels.cpu.paths import PORTABLE, current, supported
from qmix.machine.found import cpu_name, torch_threads
from qmix.machine.rates import RATE_NAMES, FourBitProducts, Rates
from qmix.version import __version__

STACK = ("torch", "bitsandbytes", "transformers", "numba", "llvmlite")  # decides how products are computed
# These depend on the versions of the stack, the next on the CPU path and the threads.
SOFTWARE_RATES = ("matmul", "four_bit_read", "half_read", "gpu_matmul", "layer_seconds")
CPU_RATES = ("memory_read", "matmul", "four_bit_read", "half_read", "layer_seconds", "read_seconds")
Rows = Annotated[int, msgspec.Meta(ge=1, le=2**20)]
Rate = Annotated[float, msgspec.Meta(ge=1e-9, le=1e21)]  # any machine's; plans can compute with it


class FourBitTrial(msgspec.Struct, frozen=True):
    """The kernels that multiplied 4-bit matrices in a trial.

    `path` names the instructions of the kernels, see `qmix.kernels.cpu.paths`. `large` and `small` name the library
    whose kernel multiplied a matrix of that size ("qmix", "bitsandbytes"); None where its rows were dequantised a few
    at a time. `rate` is bytes/s of the large matrix with one token and the matrix in cache; `times` is how much faster
    that is than dequantising.
    """

    path: str
    large: str | None
    small: str | None
    correct: bool
    rate: Rate
    times: Rate

    @property
    def fast(self) -> bool:
        """True if kernels of vector instructions multiplied and gave the right values."""
        return self.correct and self.path != PORTABLE and None not in (self.large, self.small)


class CpuProfile(msgspec.Struct, frozen=True):
    """Results on one CPU path with one number of threads, under the versions in `stack`.

    `widened_from` are numbers of rows of x by precision and type, like "nf4 bf16": from there on it is faster to
    dequantise a matrix and multiply with torch's product.
    """

    rates: dict[str, Rate] = {}
    widened_from: dict[str, Rows] = {}
    four_bit: FourBitTrial | None = None
    stack: dict[str, str] = {}


class MeasuredGpus(msgspec.Struct, frozen=True):
    """The GPUs whose rates were measured, as the driver names them, and the bytes of CUDA's context on one of them.

    `dense_from` has by precision and type, like "nf4 bf16", the tokens from which on dequantising an expert is faster.
    """

    names: tuple[str, ...] = ()
    context: Annotated[int, msgspec.Meta(ge=1, le=2**40)] | None = None
    dense_from: dict[str, Rows] = {}


class MachineProfile(msgspec.Struct, frozen=True):
    """The file's content. `machine` and `stack` identify the machine and the versions that were measured.

    `cpu` has what depends on the CPU path and the threads, by both: "avx2, 8 threads". `rates` has the others.
    """

    schema: Literal["qmix-machine-1"]
    machine: dict[str, str | int | None]
    rates: dict[str, Rate]
    stack: dict[str, str] = {}
    cpu: dict[str, CpuProfile] = {}
    gpus: MeasuredGpus = MeasuredGpus()
    measured_at: str = ""


def profile_path() -> Path:
    """Return the path of this machine's profile."""
    return state_directory() / "machine.json"


def measured_rates(path: Path | None = None) -> Rates:
    """Return typical rates, replaced by the rates measured on this machine.

    A profile of another machine is ignored; of one with other versions only the hardware's rates are used. The CPU's
    rates are those of the path and the number of threads in use. Measured with another number of threads only, they
    are scaled (`Rates.with_threads`).
    """
    known = _known(path)
    if known is None:
        return Rates()
    found = Rates().with_measured(_usable(known.rates, known.stack))
    measured = {count: _usable(cpu.rates, cpu.stack) for count, cpu in _by_threads(known).items()}
    measured = {count: rates for count, rates in measured.items() if rates}
    threads = torch_threads()
    if threads in measured:
        return found.with_measured(measured[threads])
    if not measured:
        return found
    nearest = min(measured, key=lambda count: abs(count - threads))
    return found.with_threads(measured[nearest], nearest, threads)


def _usable(rates: Mapping[str, float], stack: Mapping[str, str]) -> dict[str, float]:
    """Return the rates that still hold with the versions installed now."""
    same = stack == _stack()
    return {name: rates[name] for name in RATE_NAMES if name in rates and (same or name not in SOFTWARE_RATES)}


def _by_threads(known: MachineProfile) -> dict[int, CpuProfile]:
    """Return what was measured on the path in use, by the number of threads."""
    every = {_key(current().name, count): count for count in range(1, (os.cpu_count() or 1) + 1)}
    return {every[key]: cpu for key, cpu in known.cpu.items() if key in every}


def _key(path: str, threads: int) -> str:
    return f"{path}, {threads} threads"


def _in_use(known: MachineProfile | None) -> CpuProfile:
    """Return what was measured on this path with so many threads under the same versions; empty if nothing was."""
    found = known.cpu.get(_key(current().name, torch_threads())) if known else None
    return found if found is not None and found.stack == _stack() else CpuProfile(stack=_stack())


def widened_from(dtype: str, path: Path | None = None) -> dict[str, int]:
    """Return by precision from how many rows of x on dequantising and torch's product are faster, as measured here.

    `dtype` is "bf16" or "fp16". A precision that is not there has its own product for every number of rows.
    """
    return _of_type(_in_use(_known(path)).widened_from, dtype)


def dense_from(dtype: str, path: Path | None = None) -> dict[str, int]:
    """Return by precision from how many tokens of an expert on a GPU dequantises it, as measured on this one."""
    return _of_type(measured_gpus(path).dense_from, dtype)


def _of_type(found: Mapping[str, int], dtype: str) -> dict[str, int]:
    return {name.split()[0]: rows for name, rows in found.items() if name.endswith(f" {dtype}")}


def measured_gpus(path: Path | None = None) -> MeasuredGpus:
    """Return the GPUs that were measured here; what depends on other versions is left out."""
    known = _known(path)
    if known is None:
        return MeasuredGpus()
    return known.gpus if known.stack == _stack() else MeasuredGpus(known.gpus.names)


def tried_four_bit(path: Path | None = None) -> FourBitTrial | None:
    """Return the last trial of a 4-bit product, None where none was made here with these versions."""
    return _in_use(_known(path)).four_bit


def four_bit_products(path: Path | None = None) -> FourBitProducts:
    """Return how 4-bit products are computed here: as tried, or else by the processor's flags."""
    tried = tried_four_bit(path)
    if tried is None:
        return FourBitProducts(supported()[0].name != PORTABLE)
    return FourBitProducts(tried.fast, tried=True)


def keep(
    rates: Mapping[str, float] | None = None,
    four_bit: FourBitTrial | None = None,
    path: Path | None = None,
    widened: Mapping[str, int] | None = None,
    gpus: MeasuredGpus | None = None,
) -> Path:
    """Write new rates or a new trial beside what is known of the rest; return the path. Raises QmixError.

    The CPU's rates, the trial and `widened`, a CpuProfile's `widened_from`, are kept for this path and these threads.
    `gpus` are those whose rates are among `rates`.
    """
    target = path or profile_path()
    known, stack = _known(target), _stack()
    others = _usable(known.rates, known.stack) if known else {}
    before = _in_use(known)
    if rates is not None:
        others = {name: rate for name, rate in rates.items() if name not in CPU_RATES}
        before = CpuProfile({name: rates[name] for name in CPU_RATES if name in rates}, {}, before.four_bit, stack)
    cpu = msgspec.structs.replace(
        before,
        four_bit=four_bit or before.four_bit,
        widened_from=dict(widened) if widened is not None else before.widened_from,
    )
    content = MachineProfile(
        schema="qmix-machine-1",
        machine=_identity(),
        rates=others,
        stack=stack,
        cpu={**(known.cpu if known else {}), _key(current().name, torch_threads()): cpu},
        gpus=gpus or measured_gpus(target),
        measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n")
    except OSError as error:
        raise QmixError(f"{target}: {error.strerror}; the measurements are not kept") from None
    return target


def _known(path: Path | None) -> MachineProfile | None:
    """Return the kept profile if it is of this machine."""
    found = read_state(path or profile_path(), MachineProfile)
    return found if found is not None and found.machine == _identity() else None


def _identity() -> dict[str, str | int | None]:
    """Return what tells machines apart that share a home directory."""
    return {"node": platform.node(), "cpu": cpu_name(), "cores": os.cpu_count()}


def _stack() -> dict[str, str]:
    """Return the versions that decide how products are computed."""
    return {"qmix": __version__, "python": platform.python_version()} | versions(STACK)


def versions(names: Iterable[str]) -> dict[str, str]:
    """Return the installed version of each distribution, or "missing"."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found
