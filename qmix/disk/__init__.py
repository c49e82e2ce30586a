"""Read and write files past the page cache, in parallel and by priority, and check free space first.

May import only the ground: errors and units."""

PAGE = 4096  # bytes; O_DIRECT wants memory, offsets and sizes to be multiples of it
