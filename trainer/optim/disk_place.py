"""Masters and moments on a disk, of which the host holds a few subgroups at a time.

The memory is one pool of exactly as many pages as the subgroups under way need, read and written past the page cache:
while one subgroup is updated the next is read and the one before is written (Liang et al., MemAscend, 2505.23254: what
ZeRO-Infinity loses to buffers of one size for all and to rounded allocations).

    from the disk │ read 0 │ read 1 │ read 2  │ read 3
    host                   │ upd. 0 │ upd. 1  │ upd. 2
    to the disk                     │ write 0 │ write 1
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...configs.errors import Problem, UserError
from ...parallel.comm.disk import Disk, DiskFile
from ...parallel.comm.host_memory import HostMemory, whole_pages
from ...parallel.comm.lane import Lane, Pending

SLOTS = 3
"""Subgroups in the pool: one that is read, one that is updated, one that is written."""


@dataclass
class _PoolSlot:
    """Pages for one subgroup, and the transfer that was the last to use them."""

    pages: Tensor
    busy: Pending[None] | None = None


@dataclass(frozen=True)
class _Span:
    """Whole pages of a file that hold a run, and their place in the pool."""

    file: DiskFile
    start: int
    pages: Tensor
    run: Tensor
    """Of the pool, typed."""


class _OnDisk:
    """The `Fetched` of runs that lie on the disk."""

    def __init__(self, slot: _PoolSlot, spans: Sequence[_Span], reads: Lane, writes: Lane) -> None:
        self._slot, self._spans, self._writes = slot, spans, writes
        self._read = slot.busy = reads.submit(lambda: _transfer(spans, write=False))

    def wait(self) -> list[Tensor]:
        self._read.landed()
        return [span.run for span in self._spans]

    def store(self) -> None:
        spans = self._spans
        self._slot.busy = self._writes.submit(lambda: _transfer(spans, write=True))


def _transfer(spans: Sequence[_Span], *, write: bool) -> None:
    for span in spans:
        move = span.file.write if write else span.file.read
        move(span.pages.numpy().data, start=span.start)


class DiskStatePlace:
    """Files of this process on a disk.

    Args:
        disk: where.
        pinned: copy engines of GPUs read and write the pool.
    """

    direct = False

    def __init__(self, disk: Disk, *, pinned: bool) -> None:
        self._disk, self._pinned = disk, pinned
        self._files: list[tuple[int, int, DiskFile]] = []
        """(first address, bytes, file) of what was allocated, by address."""
        self._reads, self._writes = (Lane(f"states {way} the disk", "cpu") for way in ("from", "to"))
        self._slot_bytes, self._next = 0, 0
        self._pool: HostMemory | None = None
        self._slots: list[_PoolSlot] = []

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        nbytes = numel * dtype.itemsize
        try:
            file = self._disk.file(whole_pages(nbytes))
        except OSError as error:
            message = f"{self._disk.folder} takes no {nbytes:,} bytes more of masters and moments: {error}"
            raise UserError(Problem("memory.offload_disk", f"{message}; set another folder")) from None
        tensor = file.view(nbytes).view(dtype)
        bisect.insort(self._files, (tensor.data_ptr(), nbytes, file), key=lambda each: each[0])
        return tensor

    def reserve(self, runs: Sequence[int]) -> None:
        self._slot_bytes = max(self._slot_bytes, sum(map(whole_pages, runs)))

    def fetch(self, runs: Sequence[Tensor]) -> _OnDisk:
        if self._pool is None:
            self._pool = HostMemory(SLOTS * self._slot_bytes, pinned=self._pinned)
            self._slots = [_PoolSlot(pages) for pages in self._pool.pages.split(max(self._slot_bytes, 1))]
        slot = self._slots[self._next % SLOTS]
        self._next += 1
        if slot.busy is not None:
            slot.busy.landed()
        spans, at = [], 0
        for run in runs:
            file, start = self._find(run)
            nbytes = run.numel() * run.element_size()
            pages = slot.pages[at : at + whole_pages(nbytes)]
            spans.append(_Span(file, start, pages, pages[:nbytes].view(run.dtype)))
            at += len(pages)
        return _OnDisk(slot, spans, self._reads, self._writes)

    def _find(self, run: Tensor) -> tuple[DiskFile, int]:
        """The file of a view of what was allocated, and its first byte there."""
        address = run.data_ptr()
        first, _, file = self._files[bisect.bisect_right(self._files, address, key=lambda each: each[0]) - 1]
        return file, address - first

    @property
    def pool_bytes(self) -> int:
        """What the host holds of it."""
        return 0 if self._pool is None else self._pool.nbytes

    def settle(self) -> None:
        for slot in self._slots:
            if slot.busy is not None:
                slot.busy.landed()

    def close(self) -> None:
        self._reads.close()
        self._writes.close()
        if self._pool is not None:
            self._pool.close()
        self._pool, self._slots, self._files = None, [], []
