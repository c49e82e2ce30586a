"""Test this machine's GPUs: values against the CPU's, bytes against the plan's.

On a machine without GPUs the same modules compute with the CPU as every device, and plans are verified on pretend
devices.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from qmix.checkpoint import open_checkpoint
from qmix.checkpoint.source import LocalSource
from qmix.engine.stream import Runner
from qmix.geometry import Geometry
from qmix.kernels.gpu.shapes import available
from qmix.machine.measured import measured_rates
from qmix.machine.rates import Rates
from qmix.model.gpu.devices import HOST
from qmix.models import EMBEDDED
from qmix.models.published import PUBLISHED
from qmix.plan import DevicePlan, Plan, make_plan
from qmix.plan.slots import MIN_SLOTS
from qmix.store.layout import StoreLayout, parse_precisions
from qmix.store.opened import Store
from qmix.store.quantize import quantize
from qmix.store.sources import layout_for
from qmix.units import format_bytes
from qmix.verify.rehearsal import Verification, verify, verify_on_gpus
from qmix.verify.split import split_is_fastest

Say = Callable[[str], None]

GIB = 2**30
PYTHON_BYTES = 500 * 2**20  # in these plans; not compared
PLANS = (  # model, RAM, GPUs, in GiB
    ("mixtral-8x22b", 64, (24,)),
    ("mixtral-8x22b", 64, (24, 24)),
    ("mixtral-8x22b", 32, (24, 24)),
    ("mixtral-8x22b", 24, ()),
    ("mixtral-8x7b", 32, (12,)),
)
PROMPT = (  # longer than a captured step, shorter than the context of the plans below
    "To install a package, open the terminal and type the name of your package manager. Click the button to go on, "
    "and wait until it has finished. Then"
)
WAYS = {  # rates, and one in so many experts is resident
    "other experts copied": (Rates(matmul=1e-9), 2),
    "other experts on the CPU": (Rates(gpu_matmul=1e-9), 2),
    "all experts resident": (Rates(), 1),
}
CLOSE = 0.02  # of the logits' spread: the rounding of other kernels
LAYERS = 4  # of 8x22B, on real GPUs
SHARE = 0.8  # of a GPU's free memory, for them


def self_test(say: Say) -> bool:
    """Run the checks, a line each to `say`; return True if all of them passed."""
    count = torch.cuda.device_count()
    if not count:
        say("no CUDA GPU here: the CPU stands in for the values, pretend devices for the bytes")
    passed = [_values("cuda" if count else HOST, min(count, 2) if count else 2, say)]
    passed += _real_bytes(min(count, 2), say) if count else _pretend_bytes(say)
    if count:
        right, line = split_is_fastest(half_on_host, measured_rates(), "cuda")
        say(line)
        passed.append(right)
    if all(passed):
        say("all passed")
    return all(passed)


def _values(kind: str, gpus: int, say: Say) -> bool:
    """Compare the embedded model's logits on GPUs with those on the CPU."""
    passed = True
    for precision in ("nf4", "int8", "half"):
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint = open_checkpoint(LocalSource(EMBEDDED["tiny"]))
            store = quantize(checkpoint, Path(scratch) / "store", layout_for(checkpoint, precision, None))
            host = spread_over(store, 0)
            want, _ = logits(store, host, Rates(), kind)
            for way, (rates, apart) in WAYS.items():
                found, graphs = logits(store, spread_over(store, gpus, apart=apart), rates, kind)
                off = (found - want).pow(2).mean(-1).sqrt().median()
                close = bool(off < CLOSE * want.std()) and bool(graphs or kind == HOST or not available())
                steps = f"{graphs} graphs for three tokens" if graphs else "no captured steps"
                title = f"logits of tiny in {precision}, {gpus} {_named(kind)}, {way}, {steps}"
                say(f"{'ok' if close else 'FAILED'}: {title}: off by {off / want.std():.2%} of their spread")
                passed &= close
    return passed


def spread_over(store: Store, gpus: int, slots: int = 4, apart: int = 2) -> Plan:
    """Return a plan with layers shared out over `gpus` GPUs, one expert in `apart` resident, `slots` for the others."""
    geometry = store.geometry
    host = make_plan(store.layout, 4 * GIB, 64, PYTHON_BYTES)
    if not gpus:
        return host
    homes = [f"gpu:{layer * gpus // geometry.num_layers}" for layer in range(geometry.num_layers)]
    experts = range(geometry.num_experts)
    return replace(
        host.with_slots(slots),
        layer_devices=tuple(homes),
        placement=tuple(tuple("disk" if expert % apart else home for expert in experts) for home in homes),
        devices=tuple(DevicePlan(f"gpu:{index}", GIB, 0, 0, 0, 0) for index in range(gpus)),
    )


def half_on_host(store: Store) -> Plan:
    """Return a plan with every other expert on one GPU, and a slot for each of the others."""
    return spread_over(store, 1, slots=store.geometry.num_records // 2)


def logits(store: Store, plan: Plan, rates: Rates, kind: str) -> tuple[torch.Tensor, int]:
    """Return logits [T, V] in fp32 on the CPU, of a prompt in one step and then three steps of a token each.

    The number is that of the graphs that were launched.
    """
    with Runner(store, plan, rates=rates, kind=kind) as runner, torch.inference_mode():
        ids = torch.tensor([runner.tokenizer(PROMPT)["input_ids"]])
        cache = runner.cache
        parts = [runner.model(ids[:, :-3], cache=cache, use_cache=True).logits]
        parts += [
            runner.model(ids[:, end - 1 : end], cache=cache, use_cache=True).logits
            for end in range(ids.shape[1] - 2, ids.shape[1] + 1)
        ]
        found = torch.cat([part[0].float().to(HOST) for part in parts])
        return found, runner.model.steps.launched if runner.model.steps is not None else 0


def _pretend_bytes(say: Say) -> list[bool]:
    """Verify some plans on pretend devices."""
    passed = []
    for name, ram, gpus in PLANS:
        layout = _layout(PUBLISHED[name].geometry)
        plan = make_plan(layout, ram * GIB, 4096, PYTHON_BYTES, gpus=[gpu * GIB for gpu in gpus])
        found = verify(plan, layout)
        machine = " + ".join(f"{gpu} GiB" for gpu in gpus) or "no GPU"
        passed.append(_report(found, f"{name} on {machine}, {ram} GiB RAM", say))
    return passed


def _real_bytes(gpus: int, say: Say) -> list[bool]:
    """Verify a plan of some layers of 8x22B, as large as the GPUs allow."""
    layout = _layout(replace(PUBLISHED["mixtral-8x22b"].geometry, num_layers=LAYERS))
    free = [torch.cuda.mem_get_info(index)[0] for index in range(gpus)]
    budgets = [min(int(SHARE * each), 8 * GIB // gpus) for each in free]
    plan = make_plan(layout, 16 * GIB, 4096, PYTHON_BYTES, gpus=budgets)
    plan = plan.with_slots(MIN_SLOTS)  # the pool does not affect this check
    title = f"{LAYERS} layers of 8x22B on {' + '.join(map(format_bytes, budgets))}"
    return [_report(verify_on_gpus(plan, layout), title, say)]


def _report(found: Verification, title: str, say: Say) -> bool:
    rows = ", ".join(f"{each.name} {format_bytes(each.found)} ({each.difference:+.2%})" for each in found.devices)
    for problem in found.problems:
        say(f"FAILED: {title}: {problem}")
    say(f"{'ok' if found.holds else 'FAILED'}: bytes of {title}: {rows}")
    return found.holds


def _layout(geometry: Geometry) -> StoreLayout:
    return StoreLayout(geometry, parse_precisions("nf4", geometry), "bf16")


def _named(kind: str) -> str:
    return "GPUs" if kind == "cuda" else "devices played by the CPU"
