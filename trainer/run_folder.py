"""The folder of a run: what is in it, one job at a time, and never two runs mixed in it.

A job that starts afresh where an earlier run has left metrics or checkpoints would keep that run's checkpoints beside
its own, and `checkpoint.resume=latest` would go on with the wrong one: so it is refused, or moves the old folder aside.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from ..configs.errors import Problem, UserError
from ..configs.paths import CHECKPOINT_FOLDER, RUN_CONFIG
from ..configs.schema import Config
from ..configs.strict_json import JsonError, open_regular, parse_json
from ..configs.tables.schedules import is_program
from .checkpoint.names import checkpoints
from .processes.run_lock import FolderLock, attempts, lock_folder

FRESH = "--fresh"
_TAIL_BYTES = 1 << 16
_OTHER_NAME = "set another name="
_OTHER_FOLDER = "set another checkpoint.dir="


class RunFile(StrEnum):
    """What a run's folder holds, beside the record, whose names `parallel.record.files` has."""

    NUMBER = "run.id"
    """A number that no other run has, where it is needed."""
    CONFIG = RUN_CONFIG
    """As the user gave it."""
    RESOLVED = "config.resolved.yaml"
    METRICS = "metrics.jsonl"
    EVENTS = "events.jsonl"
    PROGRAM = "program.json"
    PEAKS = "peaks.json"
    CURVES = "curves.png"
    WATERFALL = "waterfall.png"
    STRAGGLERS = "stragglers.png"
    REPORT = "report.html"
    CHECKPOINTS = CHECKPOINT_FOLDER
    PROFILE = "profile"
    TENSORBOARD = "tensorboard"


def run_folder(cfg: Config) -> Path:
    """Of a job."""
    return Path(cfg.runs_dir) / cfg.name


def checkpoint_folder(cfg: Config) -> Path:
    """Where the job's checkpoints are."""
    return Path(cfg.checkpoint.dir)


@dataclass(frozen=True)
class EarlierRun:
    """What a run has left.

    Args:
        steps: the last step that it reported; None: a file that cannot be read.
        checkpoint: its newest one.
    """

    steps: int | None
    checkpoint: Path | None

    @staticmethod
    def of(run: Path, directory: Path) -> EarlierRun | None:
        """What is in a run's folder and in the folder of its checkpoints; None where no step was ever done."""
        found = checkpoints(directory)
        steps = max(_last_step(run / RunFile.METRICS), _last_step(run / RunFile.EVENTS), key=lambda s: (s is None, s))
        return EarlierRun(steps, found[0][1] if found else None) if found or steps != 0 else None

    def __str__(self) -> str:
        steps = "metrics that cannot be read" if self.steps is None else f"{self.steps:,} steps" if self.steps else ""
        checkpoint = f"last checkpoint {self.checkpoint.name}" if self.checkpoint else "no checkpoint"
        return ", ".join(filter(None, (steps, checkpoint)))


def claim(
    cfg: Config, *, fresh: bool = False, config: str | Path | None = None, env: Mapping[str, str] = os.environ
) -> ExitStack:
    """Takes the run's folder, and that of its checkpoints where it lies elsewhere, for this job alone.

    Args:
        cfg: the job.
        fresh: move an earlier run aside, to NAME.1, NAME.2 …; nothing is deleted. Not when a launcher starts the job
            anew: then the earlier run is its own.
        config: the file that the job was read from.
        env: where launchers say which attempt this is.

    Returns:
        What gives the folders back when it is closed; the process's death does so too.

    Raises:
        UserError: another job holds a folder; the job would start afresh in one that an earlier run has used; or a
            folder cannot be written.
    """
    run, directory = run_folder(cfg), checkpoint_folder(cfg)
    outside = not _within(directory, run)
    fresh = fresh and not any(attempts(env).values())
    with ExitStack() as held:
        lock = _take(held, run, "name", _OTHER_NAME, env)
        if outside:
            _take(held, directory, "checkpoint.dir", _OTHER_FOLDER, env)
        earlier = EarlierRun.of(run, directory)
        if earlier is not None and fresh:
            _keep_named_files(cfg, config, [run, directory])
            if EarlierRun.of(run, run / RunFile.CHECKPOINTS) is not None:
                lock.file = _aside(run) / lock.file.name
                lock.release()
                _take(held, run, "name", _OTHER_NAME, env)
            if outside:
                _checkpoints_aside(directory)
        elif earlier is not None and not _goes_on(cfg, directory):
            raise UserError(_used(run, directory, earlier, outside))
        return held.pop_all()


def hold(cfg: Config, env: Mapping[str, str]) -> ExitStack:
    """Takes the folders of a run that goes on, in the place of a process that held them and is gone.

    Returns:
        As `claim`.

    Raises:
        UserError: another job holds one.
    """
    run, directory = run_folder(cfg), checkpoint_folder(cfg)
    with ExitStack() as held:
        _take(held, run, "name", _OTHER_NAME, env)
        if not _within(directory, run):
            _take(held, directory, "checkpoint.dir", _OTHER_FOLDER, env)
        return held.pop_all()


def used_folder(cfg: Config) -> Problem | None:
    """Why `claim` would refuse the job its folder because of an earlier run, without taking it."""
    run, directory = run_folder(cfg), checkpoint_folder(cfg)
    earlier = EarlierRun.of(run, directory)
    if earlier is None or _goes_on(cfg, directory):
        return None
    return _used(run, directory, earlier, not _within(directory, run))


def _take(held: ExitStack, folder: Path, key: str, way_out: str, env: Mapping[str, str]) -> FolderLock:
    lock = lock_folder(folder, key, way_out, env)
    held.callback(lock.release)
    return lock


def _goes_on(cfg: Config, directory: Path) -> bool:
    """Whether the job goes on with what is in its own folders."""
    resume = cfg.checkpoint.resume
    return resume is not None and (resume == "latest" or _within(Path(resume), directory))


def _used(run: Path, directory: Path, earlier: EarlierRun, outside: bool) -> Problem:
    elsewhere = outside and EarlierRun.of(run, run / RunFile.CHECKPOINTS) is None
    folder, key, other = (directory, "checkpoint.dir", _OTHER_FOLDER) if elsewhere else (run, "name", _OTHER_NAME)
    go_on = "go on with checkpoint.resume=latest, " if earlier.checkpoint is not None else ""
    return Problem(key, f"{folder} holds an earlier run ({earlier}); {go_on}{other}, or move it aside with {FRESH}")


def _within(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _keep_named_files(cfg: Config, config: str | Path | None, folders: Iterable[Path]) -> None:
    """Refuses to move away what the job itself needs."""
    named = {"checkpoint.init": cfg.checkpoint.init, "CONFIG": config}
    if is_program(cfg.parallel.pipeline_in_use.schedule):
        named["parallel.pipeline.schedule"] = cfg.parallel.pipeline_in_use.schedule
    if cfg.checkpoint.resume != "latest":
        named["checkpoint.resume"] = cfg.checkpoint.resume
    for key, value in named.items():
        for folder in folders:
            if value is not None and Path(value).exists() and _within(Path(value), folder):
                message = f"{value} is in {folder}, which {FRESH} moves aside; leave {FRESH} out, or copy it first"
                raise UserError(Problem(key, message))


def _aside(run: Path) -> Path:
    """Renames a run's folder to NAME.N, with the next free number."""
    target = run.with_name(f"{run.name}.{_next(run.parent, run.name)}")
    try:
        os.rename(run, target)
        run.mkdir()
    except OSError as error:
        raise UserError(
            Problem("name", f"{run} cannot be moved to {target} ({error.strerror}); {_OTHER_NAME}")
        ) from None
    return target


def _checkpoints_aside(directory: Path) -> None:
    """Moves checkpoints, and nothing else that lies there, into before.N inside their folder."""
    found = checkpoints(directory)
    if not found:
        return
    target = directory / f"before.{_next(directory, 'before')}"
    try:
        target.mkdir()
        for _, path in found:
            os.rename(path, target / path.name)
    except OSError as error:
        message = f"its checkpoints cannot be moved to {target} ({error.strerror}); {_OTHER_FOLDER}"
        raise UserError(Problem("checkpoint.dir", message)) from None


def _next(folder: Path, name: str) -> int:
    pattern = re.compile(re.escape(name) + r"\.([1-9]\d{0,8})")
    return max((int(match[1]) for path in folder.iterdir() if (match := pattern.fullmatch(path.name))), default=0) + 1


def _last_step(file: Path) -> int | None:
    """The last step that a file of JSON lines names; 0 without any, None where it cannot be read."""
    try:
        with os.fdopen(open_regular(file), "rb") as opened:
            opened.seek(max(0, os.fstat(opened.fileno()).st_size - _TAIL_BYTES))
            lines = opened.read(_TAIL_BYTES).splitlines()
    except FileNotFoundError:
        return 0
    except (OSError, JsonError):
        return None
    return max((step for line in lines if (step := _step(line)) is not None), default=None if lines else 0)


def _step(line: bytes) -> int | None:
    try:
        value: Any = parse_json(line)
    except JsonError:
        return None
    step = value.get("step") if isinstance(value, dict) else None
    return step if isinstance(step, int) and not isinstance(step, bool) else None
