"""Evaluate a model on lm-evaluation-harness's tasks under a memory budget; a stopped run can be resumed.

May import the engine, the terminal and every room below them."""
