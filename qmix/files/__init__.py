"""Read and write small files: bounded and typed JSON, files of whole lines, replacement in one step.

Imports disk and the rooms below it, and no torch."""

from qmix.files.lines import LineFile
from qmix.files.parse import (
    JSON_LIMIT,
    TEXT_LIMIT,
    convert_json,
    decode_json,
    read_bounded,
    read_json,
    read_state,
    read_text,
    read_versioned,
)
from qmix.files.whole import leads_to, scratch_file, sync, write_whole, written_whole

__all__ = [
    "JSON_LIMIT",
    "TEXT_LIMIT",
    "LineFile",
    "convert_json",
    "decode_json",
    "leads_to",
    "read_bounded",
    "read_json",
    "read_state",
    "read_text",
    "read_versioned",
    "scratch_file",
    "sync",
    "write_whole",
    "written_whole",
]
