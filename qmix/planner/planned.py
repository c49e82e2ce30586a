"""A plan with its model, its machine, its predicted speed, and the commands that run it."""

from __future__ import annotations

import math
import shlex
from dataclasses import asdict, dataclass, replace
from typing import Any

from qmix.errors import DoesNotFitError
from qmix.machine.rates import Machine
from qmix.models.published import PUBLISHED
from qmix.plan import Plan, predict
from qmix.plan.here import plan_for
from qmix.plan.predict import Prediction
from qmix.plan.target import PlanTarget
from qmix.units import format_bytes

MIB = 2**20


@dataclass(frozen=True)
class Planned:
    """A plan and what it was made from; `precision` as `--precision` takes it, None where the model decides."""

    subject: PlanTarget
    machine: Machine
    plan: Plan
    prediction: Prediction
    attention: str
    precision: str | None

    @property
    def commands(self) -> list[str]:
        """Shell lines that run this plan."""
        plan, name = self.plan, self.subject.name
        model = shlex.quote(PUBLISHED[name].hub_id if name in PUBLISHED else name)
        limits = f"--ram {math.ceil(plan.ram / MIB)}MiB --context {plan.context}"
        if self.precision is not None:
            limits += f" --precision {shlex.quote(self.precision)}"
        attention = "" if self.attention == "sdpa" else f" --attn {self.attention}"
        limits += attention
        if not plan.devices:
            return [f"qmix generate -m {model} {limits}"]
        gpus = " ".join(f"--gpu {budget // MIB}MiB" for budget in self.machine.gpus)
        return [
            f"qmix plan {model} {gpus} {limits} --json > plan.json",
            f"qmix generate -m {model} --plan plan.json{attention}",
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the plan as docs/plan.md describes it."""
        layout = self.subject.layout
        return {
            "fits": True,
            **self.plan.to_json(),
            "attention": self.attention,
            "model": {
                "name": self.subject.name,
                "fingerprint": self.subject.fingerprint,
                "precision": self.precision,
                "precisions": [list(row) for row in layout.precisions],
                "dtype": layout.dtype,
                "geometry": asdict(layout.geometry),
            },
            "machine": self.machine.to_json(),
            "predicted": self.prediction.to_json(),
            "commands": self.commands,
        }


def plan_on(
    subject: PlanTarget,
    machine: Machine,
    context: int | None,
    *,
    batch: int = 1,
    attention: str = "sdpa",
    precision: str | None = None,
) -> Planned:
    """Return a model's plan on a machine. Raises DoesNotFitError where its memory is too small."""
    plan = plan_for(subject.layout, None, context, attention, batch, machine=machine, use=subject.use)
    prediction = predict(plan, subject.layout, machine.speeds, subject.use)
    return Planned(subject, machine, plan, prediction, attention, precision)


def check_disk(planned: Planned) -> None:
    """Raise DoesNotFitError where the store is larger than the machine's disk."""
    disk, needed = planned.machine.disk, planned.plan.store_bytes
    if disk is not None and needed > disk:
        raise DoesNotFitError(
            f"does not fit {format_bytes(disk)} of disk: the store takes {format_bytes(needed)}; give a larger --disk, "
            "or a --precision with fewer bits",
            planned.plan.smallest,
        )


def nearest(subject: PlanTarget, machine: Machine, smallest: int, context: int | None, **options: Any) -> Planned:
    """Return the plan with the least memory that works, rounded up to MiB, and a disk without limit."""
    enough = replace(machine, ram=math.ceil(smallest / MIB) * MIB, disk=None)
    return plan_on(subject, enough, context, **options)
