"""Decide what lies where under a budget, how many bytes that takes, and how fast it will be. Loads no torch.

May import the machine, stores and every room below them."""

from qmix.plan.make import make_plan
from qmix.plan.plan import DevicePlan, Plan
from qmix.plan.predict import predict

__all__ = ["DevicePlan", "Plan", "make_plan", "predict"]
