"""How an expert's weights are held: nf4, fp4, int8 and half.

formats     which parts a matrix becomes and how many bytes they take (no torch)
blocks      one block of weights, in numba: its scale, its codes, their values
kernels     the quantisers, in numba
quantizer   rows of a checkpoint in, parts out
round_trip  a matrix as it comes back from being quantised, at any size of block
encode      an expert's matrices in half precision to one in any precision, in memory
matmul      parts in, products out
dense       projections that stay in half precision
products    qmix's own products, in numba: what is read, by whom, in which order
row_tile, packed_tile, vectors   their innermost loops, in LLVM's vectors
paths       the instruction sets that they are built for, and the one in use
team        torch's threads for them
"""
