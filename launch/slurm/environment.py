"""Looks at a node before the ranks start there: `python -m pentad.launch.slurm.environment GPUS FOLDER RUN`.

One line that says what the node has, and one for each thing that is not as the job needs it; exit code 2 then.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from ...trainer.devices.visible import visible_gpus

_SHARED_MEMORY = 256 << 20
"""Bytes for the ranks' records and the collectives of a node."""


def main(arguments: Sequence[str], env: Mapping[str, str] = os.environ) -> int:
    """Looks, and says."""
    gpus, folder, run = int(arguments[0]), Path(arguments[1]), Path(arguments[2])
    node = env.get("SLURMD_NODENAME", socket.gethostname())
    problems = list(_problems(gpus, folder, run, env))
    versions = f"python {platform.python_version()}, torch {_version('torch')}, numpy {_version('numpy')}"
    print(f"node {node}: {versions}, {visible_gpus()} GPUs, {os.cpu_count()} CPUs", flush=True)
    for problem in problems:
        print(f"error: node {node}: {problem}", file=sys.stderr, flush=True)
    return 2 if problems else 0


def _problems(gpus: int, folder: Path, run: Path, env: Mapping[str, str]) -> Iterator[str]:
    if _version("torch") == "none":
        yield f"{sys.executable} has no torch; name the environment with --python, or activate it with --setup"
    if gpus and (found := visible_gpus()) < gpus:
        yield f"{found} GPUs are visible and the job needs {gpus}"
    token = folder / "shared"
    said = token.read_text().strip() if token.exists() else "nothing"
    if said != env.get("SLURM_JOB_ID", said):
        yield f"{token} says {said}: {folder} is not the folder that the first node has; put runs_dir on shared storage"
    if not os.access(run, os.W_OK):
        yield f"{run} cannot be written"
    memory = Path("/dev/shm")
    if memory.is_dir() and (free := shutil.disk_usage(memory).free) < _SHARED_MEMORY:
        yield f"{free >> 20} MiB are free in {memory}, and the ranks of a node need {_SHARED_MEMORY >> 20}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
