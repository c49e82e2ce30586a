"""Compiled kernels for products, quantisation and attention: `cpu` for processors, `gpu` for
graphics cards.

May import only errors, so that a kernel can be read, tested and timed alone."""
