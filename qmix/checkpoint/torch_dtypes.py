"""torch types by their names in safetensors, and the half precisions by their names for users."""

from __future__ import annotations

import torch

from qmix.checkpoint.safetensors_header import DTYPES

TORCH = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
HALF = {name: TORCH[stored] for name, stored in DTYPES.items()}
