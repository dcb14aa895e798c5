"""Sinks: each takes a step's report somewhere. None of them knows a metric by name."""

from .events import EventLog
from .make import SinkSet, make_sinks

__all__ = ["EventLog", "SinkSet", "make_sinks"]
