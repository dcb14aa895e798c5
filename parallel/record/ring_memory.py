"""The memory of a ring: a file in node-local shared memory, mapped, with its space reserved."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from contextlib import suppress
from pathlib import Path


def allocate(path: Path | None, size: int) -> mmap.mmap:
    """So many zeros, of a file at `path` or of this process alone. Raises OSError where there is no room."""
    if path is None:
        return mmap.mmap(-1, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Never truncate in place: a reader of the previous file would die of SIGBUS.
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o600)
    try:
        _reserve(fd, size)
        with suppress(OSError):
            # Held by the mapping until the process ends: whoever can lock the file for itself alone knows that its
            # writer is dead, and that no watcher means to keep it.
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return mmap.mmap(fd, size)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def _reserve(fd: int, size: int) -> None:
    """Give the file real space: a sparse file on a full /dev/shm (64 MiB in a container) kills the writer by SIGBUS."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
    zeros = bytes(1 << 20)
    for offset in range(0, size, len(zeros)):
        os.pwrite(fd, zeros[: min(len(zeros), size - offset)], offset)
