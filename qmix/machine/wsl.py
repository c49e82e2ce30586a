"""Windows Subsystem for Linux: whether this is one, which paths lie on Windows drives, its memory limit, its GPU.

WSL 2 is a virtual machine with Microsoft's Linux kernel. Windows drives are mounted over a protocol between the two
systems (9p or virtiofs), which is slow and has no direct reads. By default the machine has half of the PC's memory;
`.wslconfig` in the user's Windows home changes that. A GPU appears as /dev/dxg, and CUDA's library comes from the
Windows driver. Functions take the root of the filesystem, so that recorded files can stand in for it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

DRIVE_TYPES = ("9p", "drvfs", "virtiofs")
CONFIG_LIMIT = 2**16  # bytes of a .wslconfig
CUDA_LIBRARIES = ("libcuda.so.1", "libcuda.so")
SLOW_DRIVE = "a mounted Windows drive: slow, without direct reads"
MOVE = "keep stores in Linux's own filesystem, such as ~/.cache/qmix"


@dataclass(frozen=True, slots=True)
class Wsl:
    """The settings of WSL here. `drive` is the mount point of the Windows drive that the stores lie on, None for none.

    `config` is the .wslconfig that was found, `memory` its limit as written. `device` and `library` tell whether the
    GPU's device and CUDA's library of the Windows driver are there.
    """

    version: int
    kernel: str
    drive: str | None
    config: str | None
    memory: str | None
    device: bool
    library: bool


def find_wsl(directory: Path, root: Path = Path("/")) -> Wsl | None:
    """Return what WSL decides for stores in `directory`, None outside of WSL."""
    kernel = _read(root / "proc/sys/kernel/osrelease").strip()
    version = wsl_version(root)
    if version is None:
        return None
    config, memory = _memory_setting(root)
    library = root / "usr/lib/wsl/lib"
    return Wsl(
        version,
        kernel,
        windows_drive(directory, root),
        config,
        memory,
        (root / "dev/dxg").exists(),
        any((library / name).exists() for name in CUDA_LIBRARIES),
    )


def wsl_version(root: Path = Path("/")) -> int | None:
    """Return 2 or 1 by the kernel's name, None outside of WSL."""
    kernel = _read(root / "proc/sys/kernel/osrelease") or _read(root / "proc/version")
    if "microsoft" not in kernel.lower():
        return None
    return 1 if re.search(r"-Microsoft\b", kernel) and "WSL2" not in kernel else 2


def windows_drive(path: Path, root: Path = Path("/")) -> str | None:
    """Return the mount point of the Windows drive that a path lies on, None where it lies elsewhere, or not in WSL."""
    if wsl_version(root) is None:
        return None
    place = os.path.abspath(path.expanduser())  # noqa: PTH100 -- of a path that need not exist
    with suppress(OSError):
        place = os.path.realpath(place)
    found = [(target, windows) for target, windows in _mounts(root) if _within(place, target)]
    target, windows = max(found, key=lambda mount: len(mount[0]), default=("/", False))
    return target if windows else None


def _within(place: str, target: str) -> bool:
    return target in ("/", place) or place.startswith(f"{target}/")


def _mounts(root: Path) -> Iterator[tuple[str, bool]]:
    """Yield each mount point, and whether a Windows drive is there; the last of several at one place counts."""
    found: dict[str, bool] = {}
    for line in _read(root / "proc/mounts").splitlines():
        device, target, kind, options, *_ = [*line.split(" "), "", "", "", ""]
        windows = kind in DRIVE_TYPES and ("drvfs" in f"{device},{options},{kind}" or ":\\" in _plain(device))
        found[_plain(target)] = windows
    yield from found.items()


def _plain(text: str) -> str:
    """Return a field of /proc/mounts with its octal escapes decoded: \\040 is a space."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def _memory_setting(root: Path) -> tuple[str | None, str | None]:
    """Return the .wslconfig in a Windows user's home, if it can be read, and its memory limit as written."""
    for target in (target for target, windows in _mounts(root) if windows):
        for path in sorted((root / target.lstrip("/") / "Users").glob("*/.wslconfig")):
            section = ""
            for line in _read(path).splitlines():
                text = re.split(r"[#;]", line, maxsplit=1)[0].strip()
                if text.startswith("["):
                    section = text.lower()
                elif section == "[wsl2]" and re.match(r"memory\s*=", text, re.IGNORECASE):
                    return f"/{path.relative_to(root)}", text.partition("=")[2].strip()
            return f"/{path.relative_to(root)}", None
    return None, None


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(CONFIG_LIMIT * 4).decode(errors="replace")
    except OSError:
        return ""


def drive_warning(directory: Path, root: Path = Path("/")) -> str | None:
    """Return the warning for a store on a Windows drive, None where it lies elsewhere."""
    drive = windows_drive(directory, root)
    return None if drive is None else f"{directory}: on {drive}, {SLOW_DRIVE}; {MOVE}"
