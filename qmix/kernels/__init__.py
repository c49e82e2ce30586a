"""Compiled code that multiplies, quantises and attends: `cpu` for processors.

May import only errors, so that a kernel can be read, tested and timed alone."""
