"""The device of captured steps in these tests."""

from __future__ import annotations

import os

KIND = "cuda" if "QMIX_TEST_GPU" in os.environ else "cpu"
