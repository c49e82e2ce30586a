"""Open a model under a plan and compute with it: one stream of text, many together, or layer by layer.

May import the model, the plan and every room below them; no job, no terminal, no command."""
