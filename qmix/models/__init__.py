"""Checkpoints that come with qmix, by model name."""

from __future__ import annotations

from pathlib import Path

EMBEDDED = {"tiny": Path(__file__).parent / "tiny"}
DEFAULT_MODEL = "tiny"
