"""A piece of memory into which one process writes and which others of the host read.

It has no name in any folder: the others open it by way of its maker's descriptor, and it is gone with the last process
that has it. Word 0 says whether its maker has closed it, the rest is the maker's.
"""

from __future__ import annotations

import mmap
import os

from .processes import Identity, PeerGone, identity

Words = memoryview
"""int64 words."""
_CLOSED = 0
FIRST = 1
"""The first word for use."""
_WORD = 8


class Segment:
    """This process's own.

    Args:
        words: its size, without the first.
    """

    def __init__(self, words: int) -> None:
        self.size = FIRST + words
        self.fd: int | None = os.memfd_create("pentad", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.size * _WORD)
        self.words: Words = memoryview(mmap.mmap(self.fd, self.size * _WORD)).cast("q")

    def shared(self) -> None:
        """All others have opened it: no further process can."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def close(self) -> None:
        """Tells the others that what this process posted is not there any more."""
        self.words[_CLOSED] = 1
        self.shared()


def open_segment(of: Identity, fd: int, size: int) -> Words:
    """Another process's segment, read-only.

    Raises:
        PeerGone: the process has ended, or does not let this one see it.
    """
    try:
        ours = os.open(f"/proc/{of.pid}/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise PeerGone(f"the segment of process {of.pid} cannot be opened: {error.strerror}") from error
    try:
        if identity(of.pid) != of or os.fstat(ours).st_size != size * _WORD:
            raise PeerGone(f"process {of.pid} is another one by now")
        return memoryview(mmap.mmap(ours, size * _WORD, prot=mmap.PROT_READ)).cast("q")
    finally:
        os.close(ours)


def is_closed(words: Words) -> bool:
    """Whether its maker has closed a segment."""
    return bool(words[_CLOSED])
