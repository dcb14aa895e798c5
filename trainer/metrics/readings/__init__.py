"""Readings: each gets what a step was and did, and returns the values of its metrics.

How to add one, in a file of one's own: docs/metrics.md.
"""

from ..metric import Column, Metric, Picture
from .protocol import OnRank, Reading, RunFacts, StepDone
from .registry import register

__all__ = ["Column", "Metric", "OnRank", "Picture", "Reading", "RunFacts", "StepDone", "register"]
