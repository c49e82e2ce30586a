"""Compiled kernels for products, quantisation and attention: `cpu` for processors.

May import only errors, so that a kernel can be read, tested and timed alone."""
