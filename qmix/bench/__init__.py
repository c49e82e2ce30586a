"""Measure a model on this machine and compare the measured speed with the physical ceiling.

May import the engine and every room below it."""
