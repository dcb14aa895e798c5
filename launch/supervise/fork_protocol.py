"""What a node's fork server and those who speak with it say: JSON in lines over a socket in the job's folder.

Only the standard library is imported here, for guardians.

guardian → server   {"run": [module, argument …], "env": {…}, "cwd": …, "cpus": […]}, with stdin, stdout and stderr
                    {"signal": n}
server → guardian   {"code": n}, negative for a signal: the end of its slot
"""

from __future__ import annotations

import array
import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

_NAME = "forks"
_PART = 1 << 16
_MAX_FDS = 3
_ANSWER_S = 5.0


def listen(folder: Path) -> socket.socket:
    """The fork server's socket, which only the owner of the folder can reach."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with _Near(folder) as near:
        server.bind(f"{near}/{_NAME}")
    server.listen(1024)
    return server


def open_wire(folder: Path) -> Wire:
    """A way to the fork server.

    Raises:
        OSError: nobody listens there, or not yet.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _Near(folder) as near:
            connection.connect(f"{near}/{_NAME}")
    except OSError:
        connection.close()
        raise
    return Wire(connection)


class _Near:
    """A short name for a folder: an address of a socket has 108 bytes at most."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> str:
        self._fd = os.open(self._folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        return f"/proc/self/fd/{self._fd}"

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


class Wire:
    """One end of a connection.

    Args:
        connection: its socket.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(_ANSWER_S)
        self.connection = connection
        self._buffer = b""
        self.fds: list[int] = []
        """Descriptors that have come with messages."""

    def fileno(self) -> int:
        """For `select`."""
        return self.connection.fileno()

    def send(self, fds: Sequence[int] = (), **message: Any) -> None:
        """Says something; where nobody hears it, the connection soon shows that it is broken."""
        data = json.dumps(message).encode() + b"\n"
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with suppress(OSError):
            sent = self.connection.sendmsg([data], rights)
            self.connection.sendall(data[sent:])

    def read(self) -> Iterator[bytes]:
        """The messages that have come, as JSON that is still to be read.

        Raises:
            ConnectionError: the other end is gone.
        """
        space = socket.CMSG_SPACE(_MAX_FDS * array.array("i").itemsize)
        try:
            part, rights, _, _ = self.connection.recvmsg(_PART, space, socket.MSG_CMSG_CLOEXEC)
        except OSError as error:
            raise ConnectionError(str(error)) from error
        for _, _, data in rights:
            found = array.array("i")
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
            self.fds += found
        if not part:
            raise ConnectionError("closed")
        *lines, self._buffer = (self._buffer + part).split(b"\n")
        yield from lines

    def close(self) -> None:
        """Ends it."""
        self.connection.close()
        for fd in self.fds:
            os.close(fd)
        self.fds = []
