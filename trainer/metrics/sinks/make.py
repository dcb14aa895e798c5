"""The sinks that a config asks for, as one."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ....configs.errors import UserError
from ....configs.schema import LogConfig
from ...preflight import missing_packages
from ...run_folder import RunFile
from ..notices import warn
from ..report import Report
from .console import ConsoleSink
from .jsonl import JsonlSink
from .prometheus import PrometheusSink
from .protocol import Sink
from .tensorboard import TensorBoardSink
from .wandb import WandbSink


class SinkSet:
    """All sinks of a run."""

    def __init__(self, sinks: list[Sink]) -> None:
        self.sinks = sinks
        self._silent: list[Sink] = []
        """Those whose trouble has been told."""

    def log(self, report: Report) -> None:
        """Give one step to every sink; called once for each step."""
        for sink in self.sinks:
            with self._spared(sink):
                sink.log(report)

    def add(self, report: Report) -> None:
        """Give every sink further values of the step that was logged last."""
        for sink in self.sinks:
            with self._spared(sink):
                sink.add(report)

    @contextmanager
    def _spared(self, sink: Sink) -> Generator[None, None, None]:
        """A report that a full disk or a lost network does not take is no reason to end a training run."""
        try:
            yield
        except BrokenPipeError:  # whoever read the run's output has left
            raise
        except OSError as error:
            if sink not in self._silent:
                self._silent.append(sink)
                warn(
                    f"{type(sink).__name__} cannot be written ({error.strerror or error}); training goes on without it"
                )

    def close(self) -> None:
        """Close every sink, also where one of them fails; then that one's error is raised."""
        failures: list[Exception] = []
        for sink in self.sinks:
            try:
                sink.close()
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]


def make_sinks(
    cfg: LogConfig,
    run_dir: Path,
    config_dict: Mapping[str, Any],
    total_steps: int,
    resume_step: int = 0,
    *,
    again: bool = False,
) -> SinkSet:
    """The sinks that the config asks for, on rank 0.

    config_dict: the resolved config, recorded by trackers; resume_step: the step that the run goes on from, 0 for a new
    run, unless it is the same one that goes on `again`.
    Raises UserError naming every tracker whose package is missing, before anything is opened.
    """
    problems = missing_packages(cfg)
    if problems:
        raise UserError(*problems)
    run_dir.mkdir(parents=True, exist_ok=True)
    sinks: list[Sink] = [
        JsonlSink(run_dir / RunFile.METRICS, resume_step, again=again),
        ConsoleSink(total_steps, cfg.every),
    ]
    if cfg.wandb:
        sinks.append(WandbSink(cfg.wandb_project, run_dir, config_dict, resume_step))
    if cfg.tensorboard:
        sinks.append(TensorBoardSink(run_dir / RunFile.TENSORBOARD, resume_step))
    if cfg.prometheus is not None:
        sinks.append(PrometheusSink(cfg.prometheus, run_dir.absolute().name))
    return SinkSet(sinks)
