"""CPU kernels in Numba: one set of vector operations for each instruction set, and the loops above them.

May import only errors and `qmix.kernels`."""
