"""Which process is meant, in files that outlive it: of this machine and of this start of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .processes import Identity, PeerGone, identity, runs

_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class ProcessId:
    """A process of this machine.

    Args:
        pid: its number, which may be given again after its death.
        started: when it started, in clock ticks since the machine did; 0 where that is not known.
        boot: which start of which machine; "" where that is not known.
    """

    pid: int
    started: int = 0
    boot: str = ""

    @staticmethod
    def current() -> ProcessId:
        """This process."""
        pid = os.getpid()
        try:
            started = identity(pid).start
        except PeerGone:  # a system without /proc
            started = 0
        return ProcessId(pid, started, boot_id())

    @property
    def alive(self) -> bool:
        """Whether it still runs; one that only waits to be reaped does not."""
        if self.pid <= 0 or (self.boot and self.boot != boot_id()):
            return False
        if not Path("/proc/self/stat").exists():
            return self._answers()
        try:
            return runs(Identity(self.pid, self.started or identity(self.pid).start))
        except PeerGone:
            return False

    def _answers(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            pass  # of another user
        return True


def boot_id() -> str:
    """Another one for every machine and after every start of it; "" where the system does not tell."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""
