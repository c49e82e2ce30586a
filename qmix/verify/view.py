"""Show the result of verifying a plan."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from qmix.model.gpu.devices import HOST
from qmix.units import format_bytes
from qmix.verify.rehearsal import TOLERANCE, Verification

TITLE = "verified on pretend devices: prefill and decode at full size, bytes at their peak"


def verification_table(found: Verification, title: str = TITLE) -> Table:
    """Return a table with a row for each device: planned, found, and the difference."""
    table = Table(title=Text(title), title_justify="left")
    table.add_column("")
    for name in ("planned", "found", "difference", f"within {TOLERANCE:.0%}"):
        table.add_column(name, justify="right", no_wrap=True)
    for device in found.devices:
        table.add_row(
            "RAM, without Python" if device.name == HOST else device.name,
            format_bytes(device.planned),
            format_bytes(device.found),
            f"{device.difference:+.2%}",
            "yes" if device.agrees else "NO",
        )
    return table


def to_json(found: Verification) -> dict[str, Any]:
    """Return {"holds", "devices": {name: {"planned", "found"}}, "problems"}, in bytes."""
    devices = {device.name: {"planned": device.planned, "found": device.found} for device in found.devices}
    return {"holds": found.holds, "devices": devices, "problems": list(found.problems)}
