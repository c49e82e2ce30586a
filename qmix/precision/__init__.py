"""How an expert's weights are held: nf4, fp4, int8 and half.

formats     which parts a matrix becomes and how many bytes they take (no torch)
kernels     the quantisers, in numba
quantizer   rows of a checkpoint in, parts out
matmul      parts in, products out
"""
