"""Files that are being written: locked, so that those of writers that were killed can be told from those at work."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ...configs.tokenized import META_SUFFIX

SUFFIXES = (".bin", ".idx", META_SUFFIX)


def open_locked(path: str) -> BinaryIO:
    """A new file, locked for as long as it is open: the kernel's way to tell a writer at work from one that died."""
    while True:
        file = open(path, "wb", buffering=1 << 20)  # noqa: SIM115
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        # Between opening and locking, another writer may have taken it for abandoned.
        if os.path.exists(path):
            return file
        file.close()


def remove_abandoned(prefix: str) -> None:
    """Delete unfinished files of writers of `prefix` that were killed."""
    for unfinished in glob.glob(f"{glob.escape(prefix)}.*.tmp.bin"):
        # Who can lock the file is alone with it; without locks, or permission, it stays.
        with contextlib.suppress(OSError), open(unfinished, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for suffix in SUFFIXES:
                Path(unfinished.removesuffix(".bin") + suffix).unlink(missing_ok=True)


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Alone among the writers of a folder, so that files of two pairs of one name cannot mix."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
