"""What a launcher starts in a rank's place: `python -m pentad.launch.supervise.guardian FOLDER MODULE [argument …]`.

It has `python -m MODULE …` forked by the node's fork server, with its own environment, folder, CPUs and standard
streams, passes signals on, and ends as that process ends, by a signal too. It is small: no torch, 30 ms until it waits.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from .fork_protocol import Wire, open_wire

_PASSED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)
_SERVER_S = 120.0
"""For the fork server to listen: it imports torch first."""
_LOOK_S = 1.0
"""Between two looks whether the one that started this process lives."""


def guard(folder: Path, command: list[str]) -> int:
    """Has `python -m` with the command's arguments run, and waits for its end.

    Args:
        folder: of the job on this node.
        command: module and arguments.

    Returns:
        The exit code, negative for a signal; 1 where the fork server is gone.
    """
    parent = os.getppid()
    signals = _Signals()
    wire = _reach(folder, signals)
    if isinstance(wire, int):
        return wire
    if wire is None:
        print("error: the process that forks the ranks of this node does not answer", file=sys.stderr, flush=True)
        return 1
    cpus = sorted(os.sched_getaffinity(0))
    wire.send((0, 1, 2), run=command, env=dict(os.environ), cwd=os.getcwd(), cpus=cpus)
    while True:
        ready, _, _ = select.select([wire, signals.fd], [], [], _LOOK_S)
        for number in signals.take():
            wire.send(signal=number)
        if parent and os.getppid() != parent:
            parent = 0
            wire.send(signal=signal.SIGTERM)  # whoever watches over the rank is gone: it saves and ends
        try:
            for message in wire.read() if wire in ready else ():
                return int(json.loads(message)["code"])
        except ConnectionError:
            return 1


class _Signals:
    """The signals that come, to be read from a descriptor."""

    def __init__(self) -> None:
        self.fd, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for number in _PASSED:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(write)

    def take(self) -> list[int]:
        """Those that came since."""
        try:
            return list(os.read(self.fd, 4096))
        except BlockingIOError:
            return []


def _reach(folder: Path, signals: _Signals) -> Wire | int | None:
    """A way to the fork server; minus the signal that came first; None: nobody listens there."""
    until = time.monotonic() + _SERVER_S
    while time.monotonic() < until and folder.exists():
        try:
            return open_wire(folder)
        except OSError:
            select.select([signals.fd], [], [], 0.02)
        if numbers := signals.take():
            return -numbers[0]
    return None


def end_as(code: int) -> NoReturn:
    """Ends this process with an exit code, or by a signal where it is negative."""
    if code < 0:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    end_as(guard(Path(sys.argv[1]), sys.argv[2:]))
