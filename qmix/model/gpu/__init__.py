"""Execution of a plan with GPUs: a model spread over them and the host, and what each holds and computes."""
