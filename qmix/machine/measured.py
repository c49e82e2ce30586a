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
from qmix.machine.found import cpu_name
from qmix.machine.rates import RATE_NAMES, FourBitProducts, Rates
from qmix.version import __version__

STACK = ("torch", "bitsandbytes", "transformers", "numba", "llvmlite")  # decides how products are computed
SOFTWARE_RATES = ("matmul", "four_bit_read", "gpu_matmul", "layer_seconds")  # depend on the stack's versions
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


class MeasuredGpus(msgspec.Struct, frozen=True):
    """The GPUs whose rates were measured, as the driver names them, and the bytes of CUDA's context on one of them."""

    names: tuple[str, ...] = ()
    context: Annotated[int, msgspec.Meta(ge=1, le=2**40)] | None = None


class MachineProfile(msgspec.Struct, frozen=True):
    """The file's content. `machine` and `stack` identify the machine and the versions that were measured."""

    schema: Literal["qmix-machine-1"]
    machine: dict[str, str | int | None]
    rates: dict[str, Rate]
    stack: dict[str, str] = {}
    four_bit: FourBitTrial | None = None
    gpus: MeasuredGpus = MeasuredGpus()
    measured_at: str = ""


def profile_path() -> Path:
    """Return the path of this machine's profile."""
    return state_directory() / "machine.json"


def measured_rates(path: Path | None = None) -> Rates:
    """Return typical rates, replaced by the rates measured on this machine.

    A profile of another machine is ignored; of one with other versions only the hardware's rates are used.
    """
    known = _known(path)
    if known is None:
        return Rates()
    same = known.stack == _stack()
    names = [name for name in RATE_NAMES if same or name not in SOFTWARE_RATES]
    return Rates().with_measured({name: known.rates[name] for name in names if name in known.rates})


def measured_gpus(path: Path | None = None) -> MeasuredGpus:
    """Return the GPUs that were measured here; a context of other versions is left out."""
    known = _known(path)
    if known is None:
        return MeasuredGpus()
    return known.gpus if known.stack == _stack() else MeasuredGpus(known.gpus.names)


def tried_four_bit(path: Path | None = None) -> FourBitTrial | None:
    """Return the last trial of a 4-bit product, None where none was made here with these versions."""
    known = _known(path)
    return known.four_bit if known is not None and known.stack == _stack() else None


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
    gpus: MeasuredGpus | None = None,
) -> Path:
    """Write new rates or a new trial beside what is known of the rest; return the path. Raises QmixError.

    `gpus` are those whose rates are among `rates`.
    """
    target = path or profile_path()
    known, stack = _known(target), _stack()
    if known is not None and known.stack != stack:
        others = {name: rate for name, rate in known.rates.items() if name not in SOFTWARE_RATES}
        known = msgspec.structs.replace(known, rates=others, four_bit=None, gpus=MeasuredGpus(known.gpus.names))
    content = MachineProfile(
        schema="qmix-machine-1",
        machine=_identity(),
        rates=dict(rates) if rates is not None else known.rates if known else {},
        stack=stack,
        four_bit=four_bit or (known.four_bit if known else None),
        gpus=gpus or (known.gpus if known else MeasuredGpus()),
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
    """Return the versions and the CPU path that decide how products are computed."""
    found = {"qmix": __version__, "python": platform.python_version(), "cpu_path": current().name}
    return found | versions(STACK)


def versions(names: Iterable[str]) -> dict[str, str]:
    """Return the installed version of each distribution, or "missing"."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found
