"""Tests in `values` run the kernels. `test_values` gives them a process, in Triton's interpreter or on a GPU."""

from __future__ import annotations

collect_ignore = ["values"]
