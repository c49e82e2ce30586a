"""Measure how far quantised experts change the model's predictions.

May import the engine and every room below it."""
