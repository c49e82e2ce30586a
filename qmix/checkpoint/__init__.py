"""Published weights: where they come from, what their tensors are called, and how their rows are read.

source      a local directory or a hub repository: files, fetched as they are needed
naming      the published formats' tensor names, and the rows of a matrix in each
reader      the checkpoint as a whole: an index over all shards, checked against the geometry
"""

from qmix.checkpoint.reader import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
