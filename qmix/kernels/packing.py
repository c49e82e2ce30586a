"""Constants of the packed 4-bit layout that kernels and formats share."""

BLOCK = 64  # weights that share an absmax
PACK_ROWS = 32  # rows interleaved in the packed layout
