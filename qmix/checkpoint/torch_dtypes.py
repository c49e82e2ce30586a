"""torch's types for those that safetensors names, and for the two half precisions as users name them."""

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
