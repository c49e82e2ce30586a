"""Check the packages that a measurement needs, and identify what its results belong to."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from gpu_steps import ROOT, StepError, python

REQUIREMENT = re.compile(r'^    "([^"]+)",$', re.MULTILINE)  # of pyproject.toml's dependencies


def needed() -> list[str]:
    """Return what qmix needs, as pyproject.toml has it: "torch>=2.9,<2.14"."""
    return REQUIREMENT.findall((ROOT / "pyproject.toml").read_text().split("\ndependencies = [")[1].split("\n]")[0])


def unmet(requirements: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return which packages are not installed, and which are in another version."""
    missing, others = [], []
    for each in requirements:
        name = re.split(r"[^A-Za-z0-9_.-]", each)[0]
        if (there := _version(name)) is None:
            missing.append(name)
        elif not _suits(each, there):
            others.append(f"{name} {there} ({each})")
    return missing, others


def torch_gpus() -> int:
    """Return how many GPUs torch finds, asked in a process of its own: it would keep a context of CUDA."""
    try:
        return int(python("-c", "import torch; print(torch.cuda.device_count())", limit=120))
    except (StepError, ValueError):
        return 0


def _suits(requirement: str, there: str) -> bool:
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:
        return True
    return Requirement(requirement).specifier.contains(there, prereleases=True)


def about(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what results belong to: the GPUs, the versions, and the state of the source."""
    versions = {name: _version(name) for name in ("torch", "triton", "bitsandbytes", "transformers")}
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    names = [{name: gpu[name] for name in ("name", "total", "driver", "capability")} for gpu in found]
    return {"gpus": names, "versions": versions, "commit": commit, "python": platform.python_version()}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
