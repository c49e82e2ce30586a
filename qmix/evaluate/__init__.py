"""A model's figures on lm-evaluation-harness's tasks, under a memory budget, resumable."""
