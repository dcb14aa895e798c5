"""Prometheus: the newest step's numbers, to be asked for over a port or in a file of node-exporter's collector."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from pathlib import Path

from ....configs.errors import Problem, UserError
from ..report import Report

_EVERY_S = 5.0
"""Between two writes of the file, which is read every 15 s or so."""
_SHUT_S = 5.0
"""For an answer that is being given; then its thread, a daemon, is left behind."""
_NO_LETTER = re.compile(r"[^a-zA-Z0-9_]")


class PrometheusSink:
    """Gauges under the trackers' keys: `perf/mfu` is `pentad_perf_mfu{run="NAME"}`.

    Args:
        target: a port, on which `/metrics` answers, or a file whose name ends in .prom, replaced as a whole.
        run: its name, the label of every gauge.

    Raises:
        UserError: the port is taken, or the file cannot be written.
    """

    def __init__(self, target: str, run: str) -> None:
        from prometheus_client import CollectorRegistry, Gauge, start_http_server, write_to_textfile

        # A registry of its own: a process may train several runs, and the default one has the interpreter's numbers.
        self._registry, self._gauge, self._run = CollectorRegistry(), Gauge, run
        self._gauges: dict[str, Gauge] = {}
        self._close: Callable[[], object] | None = None
        self._path: Path | None = None
        self._to_file = write_to_textfile
        try:
            if target.isdecimal():
                server, thread = start_http_server(int(target), registry=self._registry)
                self._close = lambda: (server.shutdown(), server.server_close(), thread.join(_SHUT_S))
            else:
                self._path = Path(target).absolute()
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._write()
                self._written_at = -math.inf  # the first step's numbers are written at once
        except OSError as error:
            message = f"{target} cannot be used ({error.strerror or error}); set another port or file, or null"
            raise UserError(Problem("log.prometheus", message)) from None

    def log(self, report: Report) -> None:
        self._set("step", report.step)
        for key, value in report.tracked.items():
            if isinstance(value, (int, float)):  # neither pictures nor texts
                self._set(key, float(value))
        if self._path is not None and time.monotonic() - self._written_at >= _EVERY_S:
            self._write()

    def add(self, report: Report) -> None:
        self.log(report)

    def close(self) -> None:
        if self._path is not None:
            self._write()
        if self._close is not None:
            self._close()

    def _set(self, key: str, value: float) -> None:
        name = "pentad_" + _NO_LETTER.sub("_", key)
        if name not in self._gauges:
            self._gauges[name] = self._gauge(name, f"{key} of the newest step", ["run"], registry=self._registry)
        self._gauges[name].labels(self._run).set(value)

    def _write(self) -> None:
        self._written_at = time.monotonic()
        self._to_file(str(self._path), self._registry)
