"""Verify plans on pretend devices, and on real ones where this machine has them.

May import the engine, the terminal and every room below them."""
