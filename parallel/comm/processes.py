"""Other processes of this host: which one is meant, whether it lives, and what lies in its memory.

A process is named by its id and the time of its start, for ids are given out again. Its memory is only ever read
(process_vm_readv): a process that was stopped and wakes up late can change nothing of what others have by then.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

_PIECE = 1 << 26
"""Bytes that are copied at a time: about 10 ms, after which the reader may stop."""
_PR_SET_PTRACER = 0x59616D61
_PARENT, _START = 1, 19
"""Fields of /proc/PID/stat, counted from the one behind the name."""


class PeerGone(RuntimeError):
    """The memory of another rank cannot be reached any more."""


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


@dataclass(frozen=True)
class Identity:
    """A process of this host, now and for ever: its id and the clock ticks from boot to its start."""

    pid: int
    start: int


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name.

    Raises:
        PeerGone: there is no such process.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError as error:
        raise PeerGone(f"process {pid} is gone") from error
    return text.rpartition(")")[2].split()


def identity(pid: int) -> Identity:
    """Who has this id now.

    Raises:
        PeerGone: nobody.
    """
    return Identity(pid, int(_stat(pid)[_START]))


def runs(who: Identity) -> bool:
    """Whether the process is there and has not ended, reaped or not."""
    try:
        fields = _stat(who.pid)
    except PeerGone:
        return False
    return int(fields[_START]) == who.start and fields[0] not in ("Z", "X")


def ancestors(pid: int) -> list[Identity]:
    """The process itself, its parent, and so on to the first process."""
    found = []
    while pid > 0:
        fields = _stat(pid)
        found.append(Identity(pid, int(fields[_START])))
        pid = int(fields[_PARENT])
    return found


def children(pid: int) -> list[Identity]:
    """Processes that this one has started and that have not ended; none on a system without /proc."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(PeerGone):
            fields = _stat(int(folder.name))
            if int(fields[_PARENT]) == pid and fields[0] not in ("Z", "X"):
                found.append(Identity(int(folder.name), int(fields[_START])))
    return found


def common_ancestor(chains: Sequence[Sequence[Identity]]) -> Identity | None:
    """The nearest process that is in every chain of ancestors."""
    rest = [set(chain) for chain in chains[1:]]
    return next((process for process in chains[0] if all(process in chain for chain in rest)), None)


def ptrace_scope() -> int:
    """Which processes of a user may read each other (Yama's): 0 all, 1 those that are allowed to, 2 and more none."""
    setting = Path("/proc/sys/kernel/yama/ptrace_scope")
    return int(setting.read_text()) if setting.exists() else 0


def allow_descendants(of: int) -> None:
    """Lets this process's memory be read by one process and all that descend from it, where Yama forbids it else."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PTRACER, ctypes.c_ulong(of), 0, 0, 0)


class Process:
    """Another rank's process.

    Args:
        rank: for errors.
        who: the process; it must be alive.

    Raises:
        PeerGone: it is not there any more.
    """

    def __init__(self, rank: int, who: Identity) -> None:
        self.rank, self.who = rank, who
        libc = ctypes.CDLL(None, use_errno=True)
        self._readv = libc.process_vm_readv
        self._readv.restype = ctypes.c_ssize_t
        vector = (ctypes.c_void_p, ctypes.c_ulong)
        self._readv.argtypes = [ctypes.c_int, *vector, *vector, ctypes.c_ulong]
        self._fd: int | None = None
        with contextlib.suppress(AttributeError, OSError):
            # Not before Linux 5.3. Where the process is gone, the start time says so.
            self._fd = os.pidfd_open(who.pid)
        # After the descriptor: what it stands for is then known to be the process that was meant.
        if not self._same():
            self.close()
            raise self._gone("it has ended")

    def alive(self) -> bool:
        """Whether the process has not ended."""
        if self._fd is None:
            return self._same()
        poll = select.poll()  # one for each call: threads must not share it
        poll.register(self._fd, select.POLLIN)
        return not poll.poll(0)

    def read(self, place: int, into: int, nbytes: int, between: Callable[[], object] | None = None) -> None:
        """Copies `nbytes` from an address there to one here; calls `between` after every piece of a long copy.

        Raises:
            PeerGone: the process has ended, or the memory cannot be read.
        """
        while nbytes:
            piece = min(nbytes, _PIECE)
            local, remote = _IoVec(into, piece), _IoVec(place, piece)
            moved = self._readv(self.who.pid, ctypes.addressof(local), 1, ctypes.addressof(remote), 1, 0)
            if moved <= 0:
                raise self._gone(os.strerror(ctypes.get_errno()))
            place, into, nbytes = place + moved, into + moved, nbytes - moved
            if nbytes and between is not None:
                between()
        # A process that lives now had its id all the time.
        if not self.alive():
            raise self._gone("it has ended")

    def close(self) -> None:
        """Gives the descriptor up."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _same(self) -> bool:
        return runs(self.who)

    def _gone(self, reason: str) -> PeerGone:
        return PeerGone(f"rank {self.rank} (process {self.who.pid}) cannot be reached: {reason}")
