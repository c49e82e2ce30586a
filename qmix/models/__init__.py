"""Checkpoints that are part of qmix, and the sizes of published ones, by model name.

Imports geometry and the rooms below it."""

from __future__ import annotations

from pathlib import Path

EMBEDDED = {"tiny": Path(__file__).parent / "tiny"}
DEFAULT_MODEL = "tiny"
