"""One job per folder: a lock that its holder's death releases, on one machine and, as well as can be, across machines.

The file `.lock` in the folder is locked (`flock`) by the holder and says who that is. The kernel releases the lock at
death, so on one machine, and on shared file systems whose locks reach across machines, the lock alone decides. Where
locks do not reach (some NFS and Lustre mounts) or do not exist, the text decides: a holder on this machine is looked up
by process and start time; one on another machine is believed as long as it touches the file now and then.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ...configs.errors import Problem, UserError
from ...configs.strict_json import JsonError, expect_int, expect_object, expect_text, parse_json
from ...parallel.comm.process_ids import ProcessId, boot_id

LOCK = ".lock"
BEAT_S = 30.0
"""Seconds between two signs of life of a holder."""
STALE_S = 300.0
"""Seconds without a sign after which a holder on another machine is taken for dead."""
_MAX_BYTES = 4096
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@dataclass(frozen=True)
class Holder:
    """Who holds a folder.

    Args:
        host: its machine.
        process: on that machine.
        since: Unix seconds.
        attempts: how often each of the launchers that know has started this job before, by launcher and job.
    """

    host: str
    process: ProcessId
    since: float
    attempts: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def current(env: Mapping[str, str]) -> Holder:
        """This process."""
        return Holder(socket.gethostname(), ProcessId.current(), time.time(), attempts(env))

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.process.pid} on host {self.host} since {since}"

    @staticmethod
    def parse(data: bytes) -> Holder | None:
        """What a lock file says; None where it says nothing that can be used."""
        try:
            known = expect_object(parse_json(data), "the lock", ("host", "process", "since", "attempts"))
            process = expect_object(known["process"], "process", ("pid", "started", "boot"))
            pid, started = (expect_int(process[key], key) for key in ("pid", "started"))
            boot, host = expect_text(process["boot"], "boot"), expect_text(known["host"], "host")
            since = expect_int(known["since"], "since", 0, 1 << 40)
            tries = expect_object(known["attempts"], "attempts")
            counted = {key: expect_int(value, "attempts") for key, value in tries.items()}
        except JsonError:
            return None
        if not host.isprintable() or len(host) > 255:
            return None
        return Holder(host, ProcessId(pid, started, boot), since, counted)

    def text(self) -> bytes:
        """What `parse` reads."""
        return json.dumps(asdict(self) | {"since": int(self.since)}).encode() + b"\n"

    def is_earlier_attempt(self, now: Holder) -> bool:
        """Whether a launcher has started `now`'s job anew, which it does after this one has ended."""
        return any(now.attempts.get(job, -1) > count for job, count in self.attempts.items())


def attempts(env: Mapping[str, str]) -> dict[str, int]:
    """How often this job was started before, by the launchers that start one anew."""
    found = {}
    for job, count in (("SLURM_JOB_ID", "SLURM_RESTART_COUNT"), ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")):
        number = env.get(count, "0")
        if env.get(job, "none") != "none" and number.isdecimal():
            found[f"{job}={env[job]}"] = int(number)
    return found


class FolderLock:
    """A folder that this process has to itself until `release`, or its death."""

    def __init__(self, file: Path, fd: int) -> None:
        self.file, self._fd = file, fd
        self._over = threading.Event()
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            try:
                os.utime(self._fd)
            except OSError:
                return

    def release(self) -> None:
        """Lets others in. Once only; later calls do nothing."""
        if self._over.is_set():
            return
        self._over.set()
        if _is_file(self.file, self._fd):
            self.file.unlink(missing_ok=True)
        os.close(self._fd)


def lock_folder(folder: Path, key: str, way_out: str, env: Mapping[str, str] = os.environ) -> FolderLock:
    """Takes a folder, which is made where it is absent.

    Args:
        folder: of a run, or of checkpoints.
        key: the config key that names it.
        way_out: what else its user can do, for the error.
        env: where launchers say which attempt this is.

    Raises:
        UserError: another job has it, or it cannot be written.
    """
    me = Holder.current(env)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for _ in range(100):  # again where a holder has left meanwhile
            lock = _try(folder, key, way_out, me)
            if lock is not None:
                return lock
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(Problem(key, f"{folder} cannot be written ({reason}); {way_out}")) from error
    raise UserError(Problem(key, f"{folder / LOCK} is made and removed all the time by others; {way_out}"))


def _try(folder: Path, key: str, way_out: str, me: Holder) -> FolderLock | None:
    file = folder / LOCK
    fd, made = _open(file)
    try:
        locked = _flock(fd)
        if not _is_file(file, fd):
            os.close(fd)
            return None
        holder = Holder.parse(os.pread(fd, _MAX_BYTES, 0))
        reason = _held(folder, holder, me, locked, made, time_since(fd, folder))
        if reason is not None:
            raise UserError(Problem(key, f"{reason}; {way_out}"))
        if locked is None and not made:
            # Without locks only making the file is one step: of two that find a dead holder's, one makes the next.
            os.unlink(file)
            os.close(fd)
            return None
        os.ftruncate(fd, 0)
        os.pwrite(fd, me.text(), 0)
        os.fsync(fd)
    except BaseException:
        os.close(fd)
        raise
    return FolderLock(file, fd)


def _open(file: Path) -> tuple[int, bool]:
    """The lock file, and whether it was made just now."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(file, flags | os.O_CREAT | os.O_EXCL, 0o644), True
    except FileExistsError:
        return os.open(file, flags | os.O_CREAT, 0o644), False


def _flock(fd: int) -> bool | None:
    """Whether it is ours; None where the file system has no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _is_file(file: Path, fd: int) -> bool:
    """Whether `fd` is still what stands at `file`."""
    try:
        there, ours = os.lstat(file), os.fstat(fd)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def time_since(fd: int, folder: Path) -> float:
    """Seconds since the file was last touched, both by the clock of the file system: clocks of hosts differ."""
    with tempfile.TemporaryFile(dir=folder) as now:
        return os.fstat(now.fileno()).st_mtime - os.fstat(fd).st_mtime


def _held(
    folder: Path, holder: Holder | None, me: Holder, locked: bool | None, made: bool, silent_s: float
) -> str | None:
    """Why the folder cannot be taken; None: it can.

    Args:
        folder: for the message.
        holder: whom the lock file names.
        me: who asks.
        locked: what `_flock` said.
        made: whether the lock file was made just now.
        silent_s: seconds since the holder's last sign.
    """
    if locked is False:
        return f"{folder} is in use by {holder or 'another job'}"
    if made:
        return None
    if holder is None:
        return None if locked else f"{folder} is in use by a job that has just begun"
    if holder.host == me.host and holder.process.boot == boot_id():
        alive = locked is None and holder.process.alive  # where there are locks, ours says that it has gone
        return f"{folder} is in use by {holder}" if alive else None
    if holder.is_earlier_attempt(me) or silent_s > STALE_S:
        return None
    return (
        f"{folder} is in use by {holder}, last sign {max(0, silent_s):.0f} s ago; if that job is over, remove "
        f"{folder / LOCK}, or wait: {STALE_S:.0f} s without a sign free it"
    )
