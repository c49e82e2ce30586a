"""Precisions of expert weights: nf4, fp4, int8 and half.

formats       the parts of a matrix in each precision, and their bytes (no torch)
record        the order of an expert's parts in its record (no torch)
quantizer     a matrix quantised by row chunks
encode        an expert quantised in memory
round_trip    a matrix quantised and dequantised, at any block size
matmul        products with quantised matrices
dense         linear layers that stay in half precision
bitsandbytes  the library, imported quietly

May import checkpoints, kernels and the rooms below them.
"""
