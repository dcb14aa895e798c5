"""What autograd keeps of a forward pass, caught at one point, so that it can be elsewhere until it is needed.

Autograd's saved tensors are replaced by views into blocks; a block is one storage, kept once however many tensors are
views of it. While the blocks of a (stage, microbatch) are on the host, its graph holds nothing on the device.

    NEW → SAVING (OFF) → RELEASED (REL) → PREPARED (PRE) → RETURNING (RLD) → HERE (RES)
                          RELEASED → STORED (STO) → DROPPED (DRP) → FETCHING (GET) → RELEASED (GOT)

The copies run on lanes: threads on a CPU, streams on CUDA. There, memory is given back and taken on the compute stream
alone, after it has waited for the copy; so the allocator may reuse it at once, and nothing has to be recorded on a
second stream, which would delay the reuse by an unknown time.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import Tensor, nn

from ..comm.lane import Lane, Pending
from ..comm.slab import DiskLanes, SharedSlab, Slab, SlabFile, SlabPlace, Stay
from ..saved_tensors import Strided, keeping, without_history
from .kind import Kind
from .needs import Kinds
from .program import Op, Ops, Program

SMALL = 1024
"""Tensors of at most so many elements stay: a copy of their own would cost more than they take."""

_ALIGN = 64
"""Bytes; of each block in a slab, so that copies and views of any dtype are aligned."""


def storage_id(storage: torch.UntypedStorage) -> int:
    """The same for a storage as long as it lives, wherever its memory is: that of spread parameters comes and goes."""
    return storage._cdata


class State(Enum):
    """Where the blocks of a (stage, microbatch) are."""

    NEW = auto()
    SAVING = auto()
    RELEASED = auto()
    STORED = auto()
    DROPPED = auto()
    FETCHING = auto()
    PREPARED = auto()
    RETURNING = auto()
    HERE = auto()


class Block:
    """The bytes of one storage."""

    __slots__ = ("at", "nbytes", "storage")

    def __init__(self, storage: torch.UntypedStorage, at: int) -> None:
        self.storage: torch.UntypedStorage | None = storage
        self.nbytes = storage.nbytes()
        self.at = at
        """First byte in the slab."""

    def bytes(self) -> Tensor:
        """(nbytes,) of the storage, on the device."""
        assert self.storage is not None
        return torch.empty(0, dtype=torch.uint8, device=self.storage.device).set_(self.storage)

    def beside(self, slab: Slab | SlabPlace) -> Iterator[tuple[Tensor, Tensor]]:
        """(n,) pieces of it on the device, each with its bytes on the host."""
        here, at = self.bytes(), 0
        for there in slab.pieces(self.at, self.nbytes):
            yield here[at : at + len(there)], there
            at += len(there)


@dataclass(frozen=True, slots=True)
class View:
    """A saved tensor: what autograd holds instead of it."""

    block: Block
    how: Strided

    def tensor(self) -> Tensor:
        """The tensor (…) in the block's present memory.

        Raises:
            RuntimeError: the block is on the host: the program has no RES before this backward pass.
        """
        storage = self.block.storage
        if storage is None:
            raise RuntimeError("a saved activation is read while it is on the host")
        return self.how.on(storage)


class Saved:
    """What one forward pass has saved; a `saved_tensors.Keeper`.

    Args:
        device: of the tensors that are caught; others stay where they are.
        elsewhere: storages that somebody else keeps anyway, as parameters and the slots of receives (`storage_id`).
    """

    def __init__(self, device: torch.device, elsewhere: Container[int]) -> None:
        self._device, self._elsewhere = device, elsewhere
        self._known: dict[int, Block] = {}
        self.blocks: list[Block] = []
        self.nbytes = 0
        """Of all blocks in a slab."""
        self.state = State.NEW
        self.copy: Pending[None] | None = None
        self.slab: Slab | SlabPlace | None = None
        """Where it is on the host, and where it was while that is being written to the disk."""
        self.left: Pending[None] | None = None
        """The last copy to where it is now."""
        self.file: SlabFile | None = None

    @contextmanager
    def catching(self) -> Iterator[None]:
        """A forward pass inside this block saves here."""
        with keeping(self):
            yield
        self._known.clear()

    def holds(self, tensor: Tensor) -> bool:
        """Whether every use of a tensor (…) is caught: the graph holds a view of a block instead of it."""
        wanted = storage_id(tensor.untyped_storage())
        mine = (block.storage for block in self.blocks)
        return tensor.numel() > SMALL and any(s is not None and storage_id(s) == wanted for s in mine)

    def pack(self, tensor: Tensor) -> Tensor | View:
        """A view into a block, or the tensor (…) where it stays."""
        if tensor.numel() <= SMALL or tensor.device != self._device or tensor.layout is not torch.strided:
            return without_history(tensor)
        if isinstance(tensor, nn.Parameter):
            return tensor
        storage = tensor.untyped_storage()
        number = storage_id(storage)
        if number in self._elsewhere:
            return without_history(tensor)
        # By number: the block keeps the storage alive, so no other one can have it while this forward pass runs.
        block = self._known.get(number)
        if block is None:
            block = self._known[number] = Block(storage, self.nbytes)
            self.blocks.append(block)
            self.nbytes += -(-block.nbytes // _ALIGN) * _ALIGN
        return View(block, Strided.of(tensor))

    def unpack(self, held: Tensor | View) -> Tensor:
        """The tensor (…) again."""
        return held.tensor() if isinstance(held, View) else held


class Offloads:
    """Runs the offloads of one rank's program.

    Args:
        program: of all ranks.
        rank: this one, on the pipeline axis.
        out, back: the lanes of copies to the host and to the device; one lane for both copies in turn.
        device: of the activations.
        elsewhere: as of `Saved`.
        disk: for a program that stores some of them there.
    """

    def __init__(
        self,
        program: Program,
        rank: int,
        *,
        out: Lane,
        back: Lane,
        device: torch.device,
        elsewhere: Iterable[int] = (),
        disk: DiskLanes | None = None,
    ) -> None:
        self._out, self._back, self._device, self._elsewhere = out, back, device, set(elsewhere)
        self._away = {(op.stage, op.index) for op in program.ranks[rank] if op.kind is Kinds.OFFLOAD}
        self._disk = disk
        self._saved: dict[tuple[int, int], Saved] = {}
        self._shared = SharedSlab(_stays(program.ranks[rank]), pinned=device.type == "cuda")
        self._last = next((op for op in reversed(program.ranks[rank]) if op.kind is Kinds.RESUME), None)
        self._slabs: dict[int, Slab] = {}
        """Of a program that stores some on the disk, by slot, like the files."""
        self._files: dict[int, SlabFile] = {}

    @property
    def handlers(self) -> dict[Kind, Callable[[Op], None]]:
        """One per kind of operation, for `execute`."""
        return {
            Kinds.OFFLOAD: self._offload,
            Kinds.RELEASE: self._release,
            Kinds.STORE: self._store,
            Kinds.DROP: self._drop,
            Kinds.FETCH: self._fetch,
            Kinds.FETCHED: self._fetched,
            Kinds.PREPARE: self._prepare,
            Kinds.RELOAD: self._reload,
            Kinds.RESUME: self._resume,
        }

    @property
    def host_bytes(self) -> int:
        """Of all slabs."""
        return self._shared.nbytes + sum(slab.memory.nbytes for slab in self._slabs.values())

    @property
    def disk_bytes(self) -> int:
        """Of all files."""
        return sum(each.file.nbytes for each in self._files.values())

    def leave(self, tensor: Tensor) -> None:
        """Somebody else keeps this tensor (…) anyway: it stays where it is."""
        self._elsewhere.add(storage_id(tensor.untyped_storage()))

    @contextmanager
    def catching(self, stage: int, index: int) -> Iterator[None]:
        """A forward pass inside this block; what it saves is caught where the program offloads it."""
        if (stage, index) not in self._away:
            yield
            return
        saved = self._saved[stage, index] = Saved(self._device, self._elsewhere)
        with saved.catching():
            yield

    def let_go(self, stage: int, index: int, x: Tensor) -> None:
        """The input (…) of a forward pass, a leaf, will only collect its gradient: where the graph has caught its
        values it holds them no longer, or they would stay on the device with it."""
        saved = self._saved.get((stage, index))
        if saved is not None and saved.holds(x):
            x.data = x.new_zeros(()).expand(x.shape)

    def clear(self) -> None:
        """Drops everything but the slabs, after a program that was left half-way.

        Copies may still run. Those to the host end before any later one does; those from it read what nobody needs.
        """
        for saved in self._saved.values():
            if saved.copy is not None:
                saved.copy.abandon()
                if saved.state is State.FETCHING and isinstance(saved.slab, Slab):
                    saved.slab.busy = saved.copy
        self._saved.clear()

    def close(self) -> None:
        """Gives the slabs back."""
        self.clear()
        self._shared.close()
        for slab in self._slabs.values():
            slab.memory.close()
        self._slabs.clear()
        self._files.clear()  # each is closed by its last copy, which may be under way after an abort

    def _enter(self, op: Op, before: State, after: State) -> Saved:
        saved = self._saved[op.stage, op.index]
        if saved.state is not before:
            raise RuntimeError(f"{op}: its activation is {saved.state.name}, not {before.name}")
        saved.state = after
        return saved

    def _offload(self, op: Op) -> None:
        saved = self._enter(op, State.NEW, State.SAVING)
        key = op.stage, op.index
        stays = self._shared.holds(key)
        slab = saved.slab = self._shared.take(key, saved.nbytes) if stays else self._take(op, saved.nbytes)
        # The lane keeps what it has to copy until it is done; the list lets go of it at the release.
        pairs = [(there, here) for b in saved.blocks for here, there in b.beside(slab)]
        saved.copy = saved.left = self._out.submit(lambda: _copy(pairs))

    def _release(self, op: Op) -> None:
        saved = self._enter(op, State.SAVING, State.RELEASED)
        assert saved.copy is not None
        saved.copy.wait()
        saved.copy = None
        for block in saved.blocks:
            block.storage = None

    def _prepare(self, op: Op) -> None:
        saved = self._enter(op, State.RELEASED, State.PREPARED)
        for block in saved.blocks:
            block.storage = torch.empty(block.nbytes, dtype=torch.uint8, device=self._device).untyped_storage()

    def _reload(self, op: Op) -> None:
        saved = self._enter(op, State.PREPARED, State.RETURNING)
        slab = saved.slab
        assert slab is not None
        pairs = [pair for b in saved.blocks for pair in b.beside(slab)]
        saved.copy = slab.read = self._back.submit(lambda: _copy(pairs))

    def _resume(self, op: Op) -> None:
        saved = self._enter(op, State.RETURNING, State.HERE)
        assert saved.copy is not None
        saved.copy.wait()
        # From here on the graph alone holds the blocks, so that each goes as soon as its last user has run. Without the
        # list: torch keeps the hooks of a forward pass, and with them all this, until its last node has run.
        del self._saved[op.stage, op.index]
        saved.blocks.clear()
        if op == self._last:
            self._shared.settle()

    def _take(self, op: Op, nbytes: int) -> Slab:
        """A slab for an activation, made when it is first needed and used in every step."""
        slab = self._slabs.get(op.slot)
        if slab is None:
            slab = self._slabs[op.slot] = Slab(nbytes, pinned=self._device.type == "cuda")
        slab.take(nbytes)
        return slab

    # To the disk and back -----------------------------------------------------------------------------------

    def _store(self, op: Op) -> None:
        saved = self._enter(op, State.RELEASED, State.STORED)
        slab, left, lanes = saved.slab, saved.left, self._lanes
        assert isinstance(slab, Slab) and left is not None
        file = saved.file = self._file(op, saved.nbytes)
        before, data = file.written, slab.view(saved.nbytes)

        def write() -> None:
            left.landed(beside=True)
            if before is not None:
                before.landed(beside=True)  # what was forwarded and so never waited for
            file.file.write(data, lanes.stopped)

        slab.busy = file.written = saved.left = lanes.store.submit(write)

    def _drop(self, op: Op) -> None:
        self._enter(op, State.STORED, State.DROPPED)

    def _fetch(self, op: Op) -> None:
        saved = self._enter(op, State.DROPPED, State.FETCHING)
        slab, file, lanes = saved.slab, saved.file, self._lanes
        assert isinstance(slab, Slab) and file is not None and saved.left is not None
        if not saved.left.done():
            # Who fills a slab waits until it is written, so nobody has yet: the host's copy is still there.
            self._forward(slab, op.slot)
            return
        saved.left.wait()  # a write that failed
        slab = saved.slab = self._take(op, saved.nbytes)
        read, data = slab.read, slab.view(saved.nbytes)

        def fetch() -> None:
            if read is not None:
                read.landed(beside=True)
            file.file.read(data, lanes.stopped)

        saved.copy = saved.left = lanes.get.submit(fetch)

    def _forward(self, slab: Slab, to: int) -> None:
        """Gives a slab the place of another one, which gets its own."""
        place = next(place for place, each in self._slabs.items() if each is slab)
        other = self._slabs.pop(to, None)
        if place != to:
            del self._slabs[place]
            if other is not None:
                self._slabs[place] = other
        self._slabs[to] = slab

    def _fetched(self, op: Op) -> None:
        saved = self._enter(op, State.FETCHING, State.RELEASED)
        if saved.copy is not None:
            saved.copy.wait()
            saved.copy = None

    @property
    def _lanes(self) -> DiskLanes:
        if self._disk is None:
            raise RuntimeError("the program stores activations on a disk, and there is none")
        return self._disk

    def _file(self, op: Op, nbytes: int) -> SlabFile:
        """The file of a slot of the disk, made when it is first needed."""
        found = self._files.get(op.slot)
        if found is None or found.file.nbytes < nbytes:
            found = self._files[op.slot] = self._lanes.file(nbytes)
        return found


def _stays(ops: Ops) -> dict[tuple[int, int], Stay]:
    """When what a rank offloads is on the host, by stage and microbatch; nothing where some of it goes on to the disk:
    how long that stays depends on the disk, so the slots of the program stand for memory of their own."""
    if any(op.kind is Kinds.STORE for op in ops):
        return {}
    ends = {(op.stage, op.index): at for at, op in enumerate(ops) if op.kind is Kinds.RESUME}
    out = [(at, op) for at, op in enumerate(ops) if op.kind is Kinds.OFFLOAD]
    return {(op.stage, op.index): Stay(at, ends[op.stage, op.index], op.slot) for at, op in out}


def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for target, source in pairs:
        target.copy_(source, non_blocking=True)
    pairs.clear()
