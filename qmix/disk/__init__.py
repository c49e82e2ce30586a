"""Read and write files past the page cache, in parallel and by priority, and check free space first.

May import only the ground: errors and units."""
