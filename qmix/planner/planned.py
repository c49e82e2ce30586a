"""A plan with its model, its machine, its predicted speed, and the commands that run it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from qmix.errors import DoesNotFitError, arg
from qmix.machine.rates import Machine
from qmix.plan import Plan, predict
from qmix.plan.here import plan_for
from qmix.plan.predict import Prediction
from qmix.plan.target import PlanTarget
from qmix.units import format_bytes

MIB = 2**20


@dataclass(frozen=True)
class Planned:
    """A plan and what it was made from; `precision` as `load` takes it, None where the model decides."""

    subject: PlanTarget
    machine: Machine
    plan: Plan
    prediction: Prediction
    attention: str
    precision: str | None

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
        advice = f"give a larger {arg('disk')}, or a {arg('precision')} with fewer bits"
        raise DoesNotFitError(
            f"does not fit {format_bytes(disk)} of disk: the store takes {format_bytes(needed)}; {advice}",
            planned.plan.smallest,
        )


def nearest(subject: PlanTarget, machine: Machine, smallest: int, context: int | None, **options: Any) -> Planned:
    """Return the plan with the least memory that works, rounded up to MiB, and a disk without limit."""
    enough = replace(machine, ram=math.ceil(smallest / MIB) * MIB, disk=None)
    return plan_on(subject, enough, context, **options)
