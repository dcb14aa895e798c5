"""Files on a disk that take what the host's memory cannot hold: written and read past the page cache where that goes.

A file has no name: it is unlinked as soon as it is open, so nothing of it is left after a run, however that ended.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import tempfile
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...configs.errors import Problem, UserError
from .host_memory import PAGE

PIECE = 4 << 20
"""Bytes that are written or read at once: between two pieces an abort is looked for."""
_PROBE = 16 << 20
"""Bytes that are written and read to measure a disk."""


class CopyStopped(RuntimeError):
    """What was being written or read is not wanted any more."""


def _never() -> bool:
    return False


class DiskFile:
    """Space on a disk; given back when nobody holds this object any more.

    Args:
        folder: on the disk.
        nbytes: how many, whole pages where `direct`.
        direct: past the page cache; then buffers and sizes are whole pages.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """

    def __init__(self, folder: Path, nbytes: int, *, direct: bool) -> None:
        self.nbytes = nbytes
        with tempfile.TemporaryFile(dir=folder, buffering=0, prefix="pentad-") as file:
            self._fd = os.dup(file.fileno())
        self._close = weakref.finalize(self, os.close, self._fd)
        if nbytes:
            os.posix_fallocate(self._fd, 0, nbytes)
        if direct:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) | os.O_DIRECT)

    def write(self, data: memoryview, stopped: Callable[[], bool] = _never, *, start: int = 0) -> None:
        """Writes bytes at the file's start, or from byte `start` on; direct: whole pages in memory, number and place.

        Raises:
            OSError: the disk does not take them.
            CopyStopped: `stopped` said so.
        """
        self._pieces(data, stopped, lambda piece, at: os.pwrite(self._fd, piece, start + at))

    def read(self, data: memoryview, stopped: Callable[[], bool] = _never, *, start: int = 0) -> None:
        """Fills `data` from the file's start, or from byte `start` on; otherwise as `write`."""
        self._pieces(data, stopped, lambda piece, at: os.preadv(self._fd, [piece], start + at))

    def view(self, nbytes: int) -> Tensor:
        """The first bytes (nbytes,) as memory, for what reads and writes them now and then: the system fetches pages as
        they are touched, and may drop them again."""
        if not nbytes:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(mmap.mmap(self._fd, nbytes), dtype=torch.uint8)

    def _pieces(self, data: memoryview, stopped: Callable[[], bool], move: Callable[[memoryview, int], int]) -> None:
        at = 0
        while at < len(data):
            if stopped():
                raise CopyStopped("the copy was given up")
            moved = move(data[at : at + PIECE], at)
            if not moved:
                raise OSError(errno.EIO, "the file ends early")
            at += moved

    def close(self) -> None:
        """Gives the space back; nothing may be under way."""
        self._close()


@dataclass(frozen=True)
class Disk:
    """A folder on a disk.

    Args:
        folder: where the files go.
        direct: whether it can be written past the page cache.
    """

    folder: Path
    direct: bool

    @staticmethod
    def open(folder: Path) -> Disk:
        """Tries it with a page.

        Raises:
            OSError: the folder cannot be written, or the disk is full.
        """
        try:
            _write_and_read(DiskFile(folder, PAGE, direct=True), PAGE)
        except OSError as error:
            # What a file system says that knows only the page cache: when the flag is set, or at the first write.
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            return Disk(folder, False)
        return Disk(folder, True)

    @property
    def note(self) -> str:
        """What a run says once about a folder that is reached through the page cache; empty for any other."""
        if self.direct:
            return ""
        return (
            f"memory.offload_disk: the file system of {self.folder} has no direct access (O_DIRECT); what goes there "
            "goes through the page cache, which takes the host's memory"
        )

    def file(self, nbytes: int) -> DiskFile:
        """A new file; arguments and errors as of `DiskFile`."""
        return DiskFile(self.folder, nbytes, direct=self.direct)

    def measure(self, nbytes: int = _PROBE) -> tuple[float, float]:
        """Bytes per second that are written, and read, in whole pages.

        Raises:
            OSError: the disk is full.
        """
        write, read = _write_and_read(self.file(nbytes), nbytes)
        return nbytes / write, nbytes / read


def open_disk(folder: str) -> Disk:
    """The disk of `memory.offload_disk`.

    Raises:
        UserError: it cannot be written.
    """
    try:
        return Disk.open(Path(folder))
    except OSError as error:
        message = f"{folder} cannot be written: {error.strerror}; set another folder"
        raise UserError(Problem("memory.offload_disk", message)) from None


def _write_and_read(file: DiskFile, nbytes: int) -> tuple[float, float]:
    """Seconds of both."""
    seconds = []
    with mmap.mmap(-1, nbytes) as memory, memoryview(memory) as data:  # whole pages
        for move in (file.write, file.read):
            started = time.perf_counter()
            move(data)
            seconds.append(max(time.perf_counter() - started, 1e-9))
    file.close()
    return seconds[0], seconds[1]
