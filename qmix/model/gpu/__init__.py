"""Run a plan with GPUs: a model spread over GPUs and the host, and each layer's experts where they lie.

May import what the model room may."""
