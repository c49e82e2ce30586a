"""The version of qmix."""

__version__ = "0.1.0"
