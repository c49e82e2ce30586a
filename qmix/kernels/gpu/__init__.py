"""GPU kernels in Triton: the steps of a token, and of many, with nothing for Python to decide in between.

Numbers that change from step to step (positions, chosen experts, addresses of records) are read from device memory, so
a CUDA graph of these launches serves every step. `shapes` loads neither torch nor Triton; the other modules load both.

May import only errors and `qmix.kernels.packing`."""
