"""The guardian of a rank that somebody else's launcher starts: `python -m pentad.launch.supervise.guarded SPARES …`.

The launcher's process becomes this one (`trainer.processes.guarding`), with the rank's own arguments behind SPARES.
The one of the node's first rank starts the node's fork server and watcher, in a folder that the others find; that of
the job's first rank has a store started too, where the launcher has none, so that no rank's death takes it away.
"""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from .fork_protocol import open_wire
from .guardian import end_as, guard

_NODE = ("GROUP_RANK", "SLURM_NODEID")
"""What tells apart nodes that share a host."""
_FOLDER_S = 60.0
_WATCHER_S = 5.0
"""For the watcher to end after its ranks."""
_RANK = "pentad.launch.supervise.guarded_rank"


def guard_rank(spares: str, argv: list[str]) -> int:
    """Has the rank run, as `guard` does.

    Args:
        spares: processes that are to be ready.
        argv: of the rank.

    Returns:
        Its exit code, negative for a signal.
    """
    first = os.environ["LOCAL_RANK"] == "0"
    folder = _folder(make=first)
    if folder is None:
        return 1
    watcher = _start_node(folder, spares) if first else None
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # torch's word for a store that no rank has to make
    code = guard(folder, [_RANK, str(folder), *argv])
    if watcher is not None:
        with suppress(subprocess.TimeoutExpired):
            watcher.wait(_WATCHER_S)
    return code


def _folder(*, make: bool) -> Path | None:
    """The job's folder on this node, where nobody else may write; None: it cannot be had."""
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT", *_NODE)
    which = hashlib.sha256("\n".join(os.environ.get(name, "") for name in names).encode()).hexdigest()[:16]
    root = Path("/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else "/tmp")
    folder = root / f"pentad-{os.geteuid()}-{which}"
    until = time.monotonic() + _FOLDER_S
    while make or not folder.exists():
        if make:
            with suppress(FileExistsError):
                folder.mkdir(mode=0o700)
            break
        if time.monotonic() > until:
            print(f"error: rank 0 of this host has not made {folder}", file=sys.stderr, flush=True)
            return None
        time.sleep(0.02)
    about = folder.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o077:
        print(f"error: {folder} is not this user's alone; remove it", file=sys.stderr, flush=True)
        return None
    if make and _in_use(folder):
        print(f"error: another job meets at {os.environ.get('MASTER_PORT')}: {folder}", file=sys.stderr, flush=True)
        return None
    for file in list(folder.iterdir()) if make else ():  # of a job that was killed, and met at the same port
        file.unlink(missing_ok=True)
    return folder


def _in_use(folder: Path) -> bool:
    try:
        open_wire(folder).close()
    except OSError:
        return False
    return True


def _start_node(folder: Path, spares: str) -> subprocess.Popen[bytes]:
    """Starts fork server and watcher; the watcher."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    python = [sys.executable, "-m"]
    server = [*python, "pentad.launch.supervise.fork_server", str(folder), str(os.getpid())]
    if os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        server.append(os.environ["MASTER_PORT"])
    subprocess.Popen(server, stdin=subprocess.DEVNULL, start_new_session=True, env=os.environ)
    watcher = [*python, "pentad.launch.supervise.watcher", str(folder), spares, "aloud"]
    return subprocess.Popen(
        watcher, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True, env=env
    )


if __name__ == "__main__":
    end_as(guard_rank(sys.argv[1], sys.argv[2:]))
