"""The Mixtral of transformers with qmix's experts, attention and KV cache in their places.

May import the plan, the pool and every room below them."""
