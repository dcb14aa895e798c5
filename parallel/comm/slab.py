"""Slabs: memory of the host that takes activations in turn, and files that take them from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from ...configs.errors import Problem, UserError
from .disk import Disk, DiskFile
from .host_memory import HostMemory, whole_pages
from .lane import Lane, Pending
from .packing import Buffer, Runs, pack

_SPARE = 8
"""Of activations whose size varies, 1/8 more is planned than the most that there was."""


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
        """For the next activation; larger where it has never been as large as this."""
        if self.busy is not None:
            self.busy.wait()
            self.busy = None
        if self.memory.nbytes < nbytes:
            self.memory.close()
            self.memory = HostMemory(nbytes, pinned=self.pinned)

    def pieces(self, at: int, nbytes: int) -> Iterator[Tensor]:
        """So many bytes from a byte on, as tensors (n,), n of them together."""
        yield self.memory.tensor[at : at + nbytes]

    def view(self, nbytes: int) -> memoryview:
        """The first so many bytes and what is left of their last page."""
        return self.memory.pages.numpy().data[: whole_pages(nbytes)]


@dataclass(frozen=True, slots=True)
class Stay:
    """When an activation is on the host in every step.

    Args:
        start, end: positions in the rank's list: of the copy to the host, and of the end of the one back.
        slot: a number that no two stays have at the same time.
    """

    start: int
    end: int
    slot: int


@dataclass
class SlabPlace:
    """The bytes of an activation in a slab that it shares, as `Slab` for one that it has for itself.

    Args:
        runs: (n,) pieces of the slab that follow each other.
        read: the last copy to the device.
    """

    runs: tuple[Tensor, ...]
    read: Pending[None] | None = None

    def pieces(self, at: int, nbytes: int) -> Iterator[Tensor]:
        """So many bytes from a byte on, as tensors (n,), n of them together."""
        for run in self.runs:
            if nbytes and at < len(run):
                piece = run[at : at + nbytes]
                yield piece
                nbytes -= len(piece)
            at = max(at - len(run), 0)


class SharedSlab:
    """Memory of the host for all activations of a rank, where they go there and no further.

    The first step shows how large each is, and gives every slot memory of its own. From then on one slab has
    them all, each at a planned place (`packing`): what is never on the host at the same time shares bytes, whichever
    stage it is of. An activation that has become larger than its place, as experts' rows do, has memory of its own
    until the end of that step, when places are planned anew.

    Args:
        stays: of a step, by stage and microbatch.
        pinned: see `HostMemory`.
    """

    def __init__(self, stays: Mapping[tuple[int, int], Stay], *, pinned: bool) -> None:
        self._stays, self._pinned = dict(stays), pinned
        self._sizes: dict[tuple[int, int], int] = {}
        self._places: dict[tuple[int, int], Runs] = {}
        """In the slab of all."""
        self._whole: HostMemory | None = None
        self._apart: dict[int, HostMemory] = {}
        """Memory of what has no place, by slot."""

    @property
    def nbytes(self) -> int:
        """Of all of it."""
        return sum(memory.nbytes for memory in self._all())

    def holds(self, key: tuple[int, int]) -> bool:
        """Whether it is for the activation of a stage and microbatch."""
        return key in self._stays

    def take(self, key: tuple[int, int], nbytes: int) -> SlabPlace:
        """For an activation, by its stage and microbatch.

        Raises:
            MemoryError: the host has no such memory.
        """
        self._sizes[key] = max(nbytes, self._sizes.get(key, 0))
        runs = self._places.get(key)
        if self._whole is not None and runs is not None and nbytes <= sum(count for _, count in runs):
            return SlabPlace(tuple(self._whole.tensor[at : at + count] for at, count in runs))
        apart = self._stays[key].slot
        memory = self._apart.get(apart)
        if memory is None or memory.nbytes < nbytes:
            if memory is not None:
                memory.close()
            memory = self._apart[apart] = HostMemory(nbytes, pinned=self._pinned)
        return SlabPlace((memory.tensor[:nbytes],))

    def settle(self) -> None:
        """Plans the places after a step in which something had none; nothing may be on the host, nor on its way.

        Raises:
            MemoryError: the host has no such memory.
        """
        if not self._apart:
            return
        self.close()
        sizes: dict[int, set[int]] = {}
        for (stage, _), nbytes in self._sizes.items():
            sizes.setdefault(stage, set()).add(nbytes)
        # Where a stage's microbatches differ, as with experts, the next one may be the largest so far.
        room = {stage: max(mine) + (max(mine) // _SPARE if len(mine) > 1 else 0) for stage, mine in sizes.items()}
        keys = list(self._sizes)
        packed = pack([Buffer(self._stays[key].start, self._stays[key].end, room[key[0]]) for key in keys])
        self._whole = HostMemory(packed.nbytes, pinned=self._pinned)
        self._places = dict(zip(keys, packed.runs, strict=True))

    def close(self) -> None:
        """Gives it back."""
        for memory in self._all():
            memory.close()
        self._apart.clear()
        self._whole = None

    def _all(self) -> list[HostMemory]:
        return [*self._apart.values(), *([self._whole] if self._whole is not None else [])]


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
