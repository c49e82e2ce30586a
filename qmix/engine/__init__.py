"""Open a model under a plan and turn token ids into token ids: one stream, many together, or layer by layer.

May import the model, the plan and every room below them; no job, no terminal, no command."""
