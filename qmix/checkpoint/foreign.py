"""Refuse files that are not a Mixtral's weights in half precision, and name what they are."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from qmix.checkpoint.source import Source
from qmix.errors import CheckpointError, UsageError
from qmix.files import read_json

HALF_NEEDED = "give the half-precision checkpoint that it was made from"
_QUANTISED = re.compile(  # tensors that only quantised checkpoints have
    r".*(\.(qweight|qzeros|scales|g_idx|SCB|weight_(format|scale|scale_inv|packed|shape|zero_point))"
    r"|\.weight_scale_2|\.input_scale|\.(absmax|nested_absmax|quant_map|nested_quant_map)|\.quant_state\..*)"
)


class _Adapter(msgspec.Struct):
    base_model_name_or_path: str | None = None


def check_file(path: Path) -> None:
    """Raise UsageError where a path is a file."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        gguf = file.read(4) == b"GGUF"
    if gguf or path.suffix == ".gguf":
        raise UsageError(f"{path}: is a GGUF file, quantised for llama.cpp; {HALF_NEEDED}")
    raise UsageError(f"{path}: is a file; give the directory of the checkpoint or store that it belongs to")


def hub_snapshot(path: Path) -> Path:
    """Return the snapshot inside a `models--ORG--NAME` folder of the Hub cache, or `path` if it is another directory.

    Raises CheckpointError where there are several snapshots and none is the main branch.
    """
    snapshots = path / "snapshots"
    if not (path.name.startswith("models--") and snapshots.is_dir()):
        return path
    main = path / "refs" / "main"
    if main.is_file() and (named := snapshots / main.read_text("utf-8", "replace").strip()).is_dir():
        return named
    there = sorted(each for each in snapshots.iterdir() if each.is_dir())
    if len(there) != 1:
        raise CheckpointError(
            f"{path}: a folder of the Hub cache with {len(there)} snapshots; give one of {snapshots}/"
        )
    return there[0]


def check_files(source: Source) -> None:
    """Raise CheckpointError where the file names are those of an adapter or a GGUF model."""
    there = source.files()
    adapter = source.small_file("adapter_config.json")
    if adapter is not None:
        base = read_json(adapter, _Adapter, CheckpointError, "fetch it again").base_model_name_or_path
        raise CheckpointError(
            f"{source.name}: is an adapter (adapter_config.json) of {base or 'another model'}; "
            "merge it into that model's weights, and give the result"
        )
    gguf = next((name for name in there if name.lower().endswith(".gguf")), None)
    if gguf is not None and not any(name.endswith((".safetensors", ".bin", ".pth", ".pt")) for name in there):
        raise CheckpointError(f"{source.name}: holds a GGUF ({gguf}), quantised for llama.cpp; {HALF_NEEDED}")


def check_not_quantised(where: str, config: dict[str, Any], tensors: Iterable[tuple[str, str]]) -> None:
    """Raise CheckpointError where `tensors` (name, type) are those of a quantised checkpoint.

    A quantization_config alone is ignored: some checkpoints in half precision have one.
    """
    named = config.get("quantization_config") or config.get("quantization")
    method = named.get("quant_method") if isinstance(named, dict) else None
    for name, dtype in tensors:
        if _QUANTISED.fullmatch(name) or (dtype.startswith(("F8", "F4", "F6", "I", "U")) and named):
            how = f"quant_method {method!r}" if isinstance(method, str) else f"tensor {name!r}"
            raise CheckpointError(f"{where}: is already quantised ({how}); {HALF_NEEDED}")
