"""Read and write files past the page cache, in parallel and by priority, and check free space first.

Imports only errors and units, and no torch."""

PAGE = 4096  # bytes; O_DIRECT needs memory, offsets and sizes that are multiples of it
HUGE_PAGE = 2 * 2**20
