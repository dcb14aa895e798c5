"""Runs one job to its end, as `pentad train` does, on the worker processes of the tests."""

from __future__ import annotations

import contextlib
import io
import socket
import uuid
from pathlib import Path

from pentad.configs import load
from pentad.configs.schema import Config
from pentad.trainer.memory.estimate import estimate
from pentad.trainer.memory.plan import decided
from pentad.trainer.preflight import preflight
from tests.distributed import run_distributed
from tests.fuzz.ranks import UNDISTURBED, Disturbance, train

LIMIT_S = 150.0
"""Seconds that a run may take."""


class RunFailed(Exception):
    """A run that `check` accepts ended with an error."""


def run_job(
    yaml: str, world: int, runs: Path, name: str, overrides: list[str], meets: Disturbance = UNDISTURBED
) -> Path:
    """Runs the job on so many ranks; its run folder.

    Args:
        yaml: the job's file.
        runs: its `runs_dir`, which may hold a run that it goes on from.
        name: of the run, for the error.
        overrides: of keys of the job.
        meets: what happens to it.

    Raises:
        RunFailed: with the first rank's traceback.
    """
    runs.mkdir(parents=True, exist_ok=True)
    file, run_id = runs / "job.yaml", f"fuzz-{uuid.uuid4().hex[:12]}"
    file.write_text(yaml)
    try:
        cfg = checked(file, [f"runs_dir={runs}", *overrides], world)
        args = (cfg, yaml, _free_port(), run_id, runs, meets)
        run_distributed(train, world, *args, timeout_s=LIMIT_S, group=False)
    except Exception as error:
        for ring in Path("/dev/shm").glob(f"*{run_id}*"):
            ring.unlink(missing_ok=True)
        raise RunFailed(f"the {name} run: {_told(error)}{_others(runs)}") from error
    return runs / cfg.name


def checked(file: Path, overrides: list[str], world: int) -> Config:
    """The job's configuration, after all that `pentad check` does, without a word.

    Raises:
        UserError: it refuses the job.
    """
    cfg = decided(load(file, overrides, world_size=world))
    with contextlib.redirect_stderr(io.StringIO()):
        preflight(cfg)
    estimate(cfg)
    return cfg


def _told(error: Exception) -> str:
    notes = "".join(getattr(error, "__notes__", []))
    return f"{type(error).__name__}: {error}\n{notes}"


def _others(runs: Path) -> str:
    """What other ranks met: the cause, where the first to tell met only its consequence."""
    found = [path for path in sorted(runs.glob("rank-*.*")) if path.suffix != ".log"]
    causes = [path for path in found if path.suffix[1:] not in _CONSEQUENCES]
    return "".join(f"\n{path.name}:\n{path.read_text()}" for path in causes)


_CONSEQUENCES = {"PeerGone", "Aborted", "LaneFailed", "TimeoutError"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
