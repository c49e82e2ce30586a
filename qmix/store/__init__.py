"""Make, open, verify and mend stores: the quantised form of a checkpoint on disk.

Imports precision, checkpoint and the rooms below them."""
