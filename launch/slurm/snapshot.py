"""The code of a job as it was when the job was written down: what is edited later does not change a requeued job."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from ...configs import UserError
from .script import CODE

_ROOMS = ("configs", "parallel", "models", "trainer", "launch")
_NUMBER = re.compile(r"[0-9]{4}")


def next_folder(run: Path) -> Path:
    """A new folder RUN/slurm/0001, 0002 … for what a job is started from.

    Raises:
        UserError: it cannot be made.
    """
    parent = run / "slurm"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            folder = parent / f"{max((int(one.name) for one in job_folders(run)), default=0) + 1:04d}"
            try:
                folder.mkdir()
            except FileExistsError:  # of another that does the same at this moment
                continue
            return folder
    except OSError as error:
        raise UserError(f"{parent} cannot be written ({error.strerror}); set another name= or runs_dir=") from None


def job_folders(run: Path) -> list[Path]:
    """The folders of a run's jobs, the newest last."""
    parent = run / "slurm"
    if not parent.is_dir():
        return []
    return sorted(one for one in parent.iterdir() if _NUMBER.fullmatch(one.name) and one.is_dir())


def take_snapshot(folder: Path) -> str:
    """Copies this program into FOLDER/code/pentad; which version it is, in a line."""
    source = Path(__file__).resolve().parents[2]
    target = folder / CODE / "pentad"
    for room in _ROOMS:
        shutil.copytree(source / room, target / room, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    return _version(source)


def _version(source: Path) -> str:
    """The commit, and whether something was changed since; where there is no repository, that."""
    asked = (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--", *_ROOMS])
    try:
        commit, changed = (
            subprocess.run(
                ["git", "-C", str(source), *arguments],
                capture_output=True,
                text=True,
                check=True,
                timeout=30,
                env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            ).stdout.strip()
            for arguments in asked
        )
    except (OSError, subprocess.SubprocessError):
        return "not under version control"
    return f"commit {commit}{', changed' if changed else ''}"
