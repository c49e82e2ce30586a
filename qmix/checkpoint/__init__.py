"""Published weights, read tensor by tensor. May import `disk` and what lies flat in `qmix`.

source      a local directory or a Hub repository: files, fetched as they are needed
naming      tensor names of the published formats, and the rows of a matrix in each
reader      the whole checkpoint: an index over all shards, checked against the geometry
rows        rows of a weight, read from a shard
"""

from qmix.checkpoint.reader import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
