"""Where the rank in the first slot reports."""

from __future__ import annotations

from ..metrics.report import Report
from ..metrics.sinks import EventLog, SinkSet


class Outputs:
    """The sinks and the event log of a run; one rank has them.

    Args:
        sinks: of steps.
        events: of all else.
        logged: the last step that is in the sinks.
    """

    def __init__(self, sinks: SinkSet, events: EventLog, logged: int = 0) -> None:
        self.sinks, self.events, self.logged = sinks, events, logged

    def log(self, report: Report) -> None:
        """Reports a step, unless that was done before: a step that is done again after a fault has the same numbers.
        Alerts become events."""
        if report.step > self.logged:
            self.logged = report.step
            self.sinks.log(report)
            self._tell(report)

    def add(self, report: Report) -> None:
        """Reports more of the step that was logged last."""
        self.sinks.add(report)
        self._tell(report)

    def _tell(self, report: Report) -> None:
        for alert in report.alerts:
            self.events.log(alert.event, **alert.fields)

    def close(self) -> None:
        """Closes all of it."""
        self.sinks.close()
        self.events.close()
