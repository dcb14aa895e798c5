"""Slabs: memory of the host that takes activations in turn, and files that take them from there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ...configs.errors import Problem, UserError
from .disk import Disk, DiskFile
from .host_memory import HostMemory, whole_pages
from .lane import Lane, Pending


class Slab:
    """Memory of the host that one activation after the other uses.

    Args:
        nbytes: how many.
        pinned: see `HostMemory`.
    """

    def __init__(self, nbytes: int, *, pinned: bool) -> None:
        self.pinned, self.memory = pinned, HostMemory(nbytes, pinned=pinned)
        self.busy: Pending[None] | None = None
        """A copy between host and disk that uses it: who fills it next waits."""
        self.read: Pending[None] | None = None
        """The last copy to the device, which a GPU may still be doing."""

    def take(self, nbytes: int) -> None:
        """For the next activation; larger where experts have got more rows than ever before."""
        if self.busy is not None:
            self.busy.wait()
            self.busy = None
        if self.memory.nbytes < nbytes:
            self.memory.close()
            self.memory = HostMemory(nbytes, pinned=self.pinned)

    def part(self, at: int, nbytes: int) -> Tensor:
        """(nbytes,) from a byte on."""
        return self.memory.tensor[at : at + nbytes]

    def view(self, nbytes: int) -> memoryview:
        """The first so many bytes and what is left of their last page."""
        return self.memory.pages.numpy().data[: whole_pages(nbytes)]


@dataclass(frozen=True)
class DiskLanes:
    """Where activations go that the host cannot hold.

    Args:
        disk: files on it.
        store, get: the lanes of copies to and from it: threads, on CUDA too.
        stopped: whether copies are to be given up.
    """

    disk: Disk
    store: Lane
    get: Lane
    stopped: Callable[[], bool]

    def file(self, nbytes: int) -> SlabFile:
        """A new file for a slab of so many bytes.

        Raises:
            UserError: the disk is full, or cannot be written any more.
        """
        try:
            return SlabFile(self.disk.file(whole_pages(nbytes)))
        except OSError as error:
            message = (
                f"{self.disk.folder} cannot take {nbytes} more bytes of activations: {error.strerror}; free some "
                "space, or offload less"
            )
            raise UserError(Problem("memory.offload_disk", message)) from None


@dataclass
class SlabFile:
    """A slot of the disk, and the last copy that writes it."""

    file: DiskFile
    written: Pending[None] | None = None
