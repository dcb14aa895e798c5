"""What is asked of SLURM: through its commands, which every cluster has."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from ...configs import UserError

_TIMEOUT_S = 60.0
_OVER = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT",
    "REVOKED",
}  # fmt: skip
"""States that a job does not leave; a requeued one is PENDING again."""


def submit(script: Path) -> str:
    """Hands a script to sbatch; the job's id.

    Raises:
        UserError: what sbatch has against it.
    """
    answer = _asked(["sbatch", "--parsable", str(script)])
    return answer.strip().partition(";")[0]


def state(job: str) -> tuple[str, str]:
    """State and reason of a job; ("UNKNOWN", "") once SLURM has forgotten it.

    Raises:
        UserError: SLURM does not answer.
    """
    answer = _asked(["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T|%r"], lost="Invalid job id")
    found, _, reason = answer.strip().partition("\n")[0].partition("|")
    return (found or "UNKNOWN", "" if reason == "None" else reason)


def is_over(found: str) -> bool:
    """Whether a job in this state runs no more, and never again."""
    return found in _OVER or found == "UNKNOWN"


def cancel(job: str, *, running: bool) -> None:
    """Takes a job out of the queue; one that runs is told to save and to leave.

    Raises:
        UserError: SLURM does not let it be.
    """
    _asked(["scancel", *(["--signal=USR1"] if running else []), job])


def _asked(command: Sequence[str], lost: str = "") -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not there: this is no machine from which SLURM takes jobs") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not answer in {_TIMEOUT_S:g} s") from None
    if done.returncode and not (lost and lost in done.stderr):
        said = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        raise UserError(f"{command[0]}: {said}")
    return done.stdout
