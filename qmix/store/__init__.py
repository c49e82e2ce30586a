"""Make, open, check and mend stores: the quantised form of a checkpoint on disk.

May import precisions, checkpoints and every room below them."""
