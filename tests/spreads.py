"""Make plans over GPUs by hand, for tests."""

from __future__ import annotations

from dataclasses import replace

from qmix.plan import DevicePlan, Plan, make_plan
from qmix.store.layout import StoreLayout

GIB = 2**30


def spread_plan(layout: StoreLayout, layer_devices: list[str], residents: set[int], slots: int = 2) -> Plan:
    """Return a plan with the layers' devices, `residents` of every layer on a GPU, and `slots` for each record size."""
    host = make_plan(layout, 4 * GIB, 64, 500 * 2**20)
    experts = range(layout.geometry.num_experts)
    placement = [
        tuple(home if home != "cpu" and expert in residents else "disk" for expert in experts) for home in layer_devices
    ]
    names = dict.fromkeys(name for name in layer_devices if name != "cpu")
    return replace(
        host.with_slots(slots),
        layer_devices=tuple(layer_devices),
        placement=tuple(placement),
        devices=tuple(DevicePlan(name, GIB, 0, 0, 0, 0) for name in names),
    )
