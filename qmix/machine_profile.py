"""What `qmix doctor` measured of this machine, kept in the user's state directory. Loads no torch."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from qmix.errors import QmixError
from qmix.machine import cpu_name, state_directory
from qmix.plan.hardware import RATE_NAMES, Rates

SCHEMA = "qmix-machine-1"


def profile_path() -> Path:
    return state_directory() / "machine.json"


def measured_rates(path: Path | None = None) -> Rates:
    """Typical rates with those that were measured on this machine; a profile of another one counts for nothing."""
    try:
        content = json.loads((path or profile_path()).read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA or content["machine"] != _identity():
            return Rates()
        found = {name: float(content["rates"][name]) for name in RATE_NAMES if name in content["rates"]}
    except (OSError, ValueError, KeyError, TypeError):
        return Rates()
    return Rates().with_measured({name: rate for name, rate in found.items() if rate > 0})


def keep_rates(rates: Mapping[str, float], path: Path | None = None) -> Path:
    """Write what was measured; returns where to. Raises QmixError."""
    target = path or profile_path()
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "machine": _identity(),
        "measured_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rates": dict(rates),
    }
    scratch = target.with_suffix(f".{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps(content, indent=1) + "\n")
        scratch.replace(target)
    except OSError as error:
        raise QmixError(f"{target}: {error.strerror}; the measurements are not kept") from None
    return target


def _identity() -> dict[str, Any]:
    """What a home directory that is shared by several machines tells them apart by."""
    return {"node": platform.node(), "cpu": cpu_name(), "cores": os.cpu_count()}
