"""What a sink is."""

from __future__ import annotations

from typing import Protocol

from ..report import Report


class Sink(Protocol):
    """A consumer of reports, on rank 0."""

    def log(self, report: Report) -> None:
        """Take one step, with every metric of the run."""
        ...

    def add(self, report: Report) -> None:
        """Take what became known of the last logged step after it was logged."""
        ...

    def close(self) -> None:
        """Write out what is buffered."""
        ...
