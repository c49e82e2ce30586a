"""CPU kernels in Numba: vector operations for each instruction set, and the loops above them.

May import only errors and `qmix.kernels`."""
