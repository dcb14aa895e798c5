"""gloo's connections, so that a thread that waits on one can be let go: gloo cannot abort (torch issue 130345)."""

from __future__ import annotations

import contextlib
import os
import socket


class GlooSockets:
    """The sockets that come about between its making and `made`, while nothing else opens any."""

    def __init__(self) -> None:
        self._before = _sockets()
        self._mine: dict[int, str] = {}

    def made(self) -> None:
        """All connections stand."""
        self._mine = {fd: name for fd, name in _sockets().items() if self._before.get(fd) != name}

    def cut(self) -> None:
        """Ends every connection: what waits on one fails within milliseconds, here and at the other end."""
        now = _sockets()
        for fd, name in (self._mine or now).items():
            if now.get(fd) != name or self._before.get(fd) == name:
                continue  # closed since, or given to something else
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as end:
                # A listener must be left alone: gloo ends the process where it cannot accept.
                if not end.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    end.shutdown(socket.SHUT_RDWR)
        self._mine = {}


def _sockets() -> dict[int, str]:
    """This process's sockets: descriptor to inode."""
    found = {}
    try:
        names = os.listdir("/proc/self/fd")
    except OSError:  # no Linux
        return {}
    for name in names:
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith("socket:"):
                found[int(name)] = target
    return found
