"""Serve a model over HTTP: `qmix serve`. May import batch and every room up to `engine`, and no other job.

Requests are checked and answered in the forms of `qmix.batch`; the files of batches are its input and output.
"""
