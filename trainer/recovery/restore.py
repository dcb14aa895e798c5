"""After a fault: the newest step whose state the ranks of the new mesh can provide, and all of them brought to it.

A step that has committed on one rank may not have on another, which was told to leave in the middle of its norm. So
ranks may be a step apart, and the copies of one that died may be older still. States are known as pieces of global
tensors alone: so it does not matter which layout they were made in, or which one is to be filled. Each rank says what
it holds of which steps, in its own memory and in copies on its node; then each sees for which steps all that it is to
have is somewhere, and they go on at the newest for which that is so everywhere. What some have beyond it is done again.
What a rank holds of that step it keeps, and the rest comes once, from the node or from another rank (`pieces.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ...parallel.comm.mesh import Mesh
from ...parallel.global_tensor import GlobalTensor
from ..checkpoint.state import all_tensors
from ..metrics.peak import Peak
from ..overlap import ChunkSearch
from ..setup import draw
from ..step import Stepper
from .moving import exchange
from .pieces import HeldPiece, Move, TensorPiece, moves
from .point import RunPoint
from .snapshots import Snapshot, copy_index, snapshots_on_node, stored_pieces


@dataclass(frozen=True)
class Live:
    """The state in the memory of a process that has left a mesh.

    Args:
        point: how far it is.
        tensors: this rank's pieces.
        epoch, slot: of the mesh.
    """

    point: RunPoint
    tensors: Mapping[str, GlobalTensor]
    epoch: int
    slot: int


@dataclass(frozen=True)
class StateSource:
    """A state of which a rank can give pieces.

    Args:
        point: how far it is.
        epoch, slot: of the mesh in which it was made.
        live: it is in the rank's memory.
        own: it is the rank's own, and stays where it is.
        index: which of the rank's indices says what is in it.
    """

    point: RunPoint
    epoch: int
    slot: int
    live: bool
    own: bool
    index: int


@dataclass(frozen=True)
class Offer:
    """What a rank brings into a mesh.

    Args:
        sources: what it can give, first what it would take itself.
        indices: of these.
        begun: step at which meshes began that it was in, by epoch.
        peak, search, resumed: what it knows, and those that come anew do not.
    """

    sources: tuple[StateSource, ...]
    indices: tuple[bytes, ...]
    begun: Mapping[int, int]
    peak: Peak | None
    search: ChunkSearch | None
    resumed: Path | None


@dataclass(frozen=True)
class Known:
    """What a process knows beside its state.

    Args:
        begun: step at which each mesh began that it was in, by epoch.
        peak, search: where a session before had them.
        resumed: the checkpoint that the job went on from.
    """

    begun: Mapping[int, int]
    peak: Peak | None = None
    search: ChunkSearch | None = None
    resumed: Path | None = None


class StateRestore:
    """Brings this rank, together with all others of a mesh, to the state of one step: `Session.open`'s `restore`.

    Args:
        folder: where this node's copies are.
        number: of this process.
        members: numbers of the processes of the mesh.
        live: what this process has in memory; none: nothing, or what is not the state after a step.
        known: what else it knows.
    """

    def __init__(self, folder: Path, number: int, members: Collection[int], live: Live | None, known: Known) -> None:
        self._folder, self._number, self._members = folder, number, members
        self._live, self._known = live, known
        self._states: list[Live | Snapshot] = []
        """Each source of this rank."""
        self._offers: list[Offer] = []
        self.resumed: Path | None = None
        """The checkpoint that the job went on from, if it did."""
        self.point: RunPoint | None = None
        """Where all ranks are now; none: nowhere, the state is that of a job before its first step."""
        self.furthest = 0
        """The last step that is known to have been done on some rank."""
        self.taken = 0
        """Bytes that this rank took from elsewhere than its own state."""
        self.moved = 0
        """The same of all ranks together."""

    def meet(self, mesh: Mesh, peak: Peak | None, search: ChunkSearch | None) -> tuple[Peak | None, ChunkSearch | None]:
        """Tells the others what there is, before anything is built.

        Args:
            mesh: the new one.
            peak, search: what this rank has of them.

        Returns:
            What all ranks have of them from now on.
        """
        known = replace(self._known, peak=peak or self._known.peak, search=search or self._known.search)
        offers = self._offers = mesh.gather_objects(self._offered(known))
        self.resumed = next((each.resumed for each in offers if each.resumed is not None), None)
        peaks = (each.peak for each in offers if each.peak is not None)
        searches = (each.search for each in offers if each.search is not None)
        return next(peaks, None), next(searches, None)

    def _offered(self, known: Known) -> Offer:
        sources, indices = list[StateSource](), dict[bytes, int]()

        def offer(point: RunPoint, epoch: int, slot: int, index: bytes, *, live: bool, own: bool) -> None:
            number = indices.setdefault(index, len(indices))
            sources.append(StateSource(point, epoch, slot, live, own, number))

        if self._live is not None:
            live, tensors = self._live, self._live.tensors
            offer(live.point, live.epoch, live.slot, copy_index(tensors), live=True, own=True)
            self._states.append(live)
        # The others of this node look at their own files; at those of the lost ones all do.
        others = [number for number in self._members if number != self._number]
        for copy in sorted(snapshots_on_node(self._folder, others), key=self._is_foreign):
            seal, own = copy.copy.seal, not self._is_foreign(copy)
            offer(copy.point, seal.epoch, seal.slot, copy.copy.index, live=False, own=own)
            self._states.append(copy)
        return Offer(tuple(sources), tuple(indices), known.begun, known.peak, known.search, known.resumed)

    def _is_foreign(self, copy: Snapshot) -> bool:
        return copy.partner or copy.number != self._number

    def fill(self, stepper: Stepper) -> None:
        """Agrees on the step and fills this rank's state.

        Raises:
            JsonError: an index is none.
            NoSnapshot: something came damaged.
        """
        offers, self._offers = self._offers, []
        wanted, mesh = all_tensors(stepper.parts, stepper.optimizer), stepper.mesh
        sources = _valid(offers)
        self.furthest = max((source.point.step for _, _, source in sources), default=0)
        while True:
            plans = _possible(wanted, offers, sources, mesh)
            mine = offers[mesh.rank].sources
            takings = {step: Taking.of(plan, mesh.rank, mine) for step, plan in plans.items()}
            everybody = mesh.gather_objects(takings)
            common = set.intersection(*(set(each) for each in everybody))
            if not common:
                begin_anew(stepper)
                break
            step = max(common)
            chosen = [each[step] for each in everybody]
            damaged = self._damaged(plans[step], chosen, mesh)
            if not damaged:
                self.point = _newest_point(step, sources)
                self._take(plans[step], chosen, wanted, mesh)
                self.taken, self.moved = chosen[mesh.rank].nbytes, sum(each.nbytes for each in chosen)
                stepper.optimizer.loaded(wanted)
                stepper.updates.fill_(float(self.point.progress.updates))
                break
            sources = [each for each in sources if each[:2] not in damaged]
        self._states, self._live = [], None

    def _damaged(self, plan: Sequence[Move], takings: Sequence[Taking], mesh: Mesh) -> set[tuple[int, int]]:
        """The copies (rank, source) that would be taken from and whose bytes are not those that were copied: only what
        is taken from is looked at."""
        every = (*plan, *(move for each in takings for move in each.moves))
        used = {move.source for move in every if move.rank == mesh.rank}
        wrong = [number for number in used if not _is_sound(self._states[number])]
        return {(rank, number) for rank, each in enumerate(mesh.gather_objects(wrong)) for number in each}

    def _take(
        self, plan: Sequence[Move], takings: Sequence[Taking], wanted: Mapping[str, GlobalTensor], mesh: Mesh
    ) -> None:
        """Copies what is on this rank, and exchanges the rest with the others."""
        me, opened = mesh.rank, dict[int, Mapping[str, GlobalTensor]]()

        def there(move: Move) -> Tensor:
            if move.source not in opened:
                opened[move.source] = self._states[move.source].tensors
            return opened[move.source][move.name].view_of(*move.region)

        for move in plan:
            if move.rank == me:
                here, place = wanted[move.name].view_of(*move.region), there(move)
                if here.data_ptr() != place.data_ptr():  # else it is the same memory
                    here.copy_(place)
        out = {to: [there(move) for move in each.moves if move.rank == me] for to, each in enumerate(takings)}
        into = dict[int, list[Tensor]]()
        for move in takings[me].moves:
            into.setdefault(move.rank, []).append(wanted[move.name].view_of(*move.region))
        exchange(mesh.axis("world"), out, into)


@dataclass(frozen=True)
class Taking:
    """What a rank takes to be at a step.

    Args:
        moves: from other ranks.
        nbytes: that and what is on its node, but not its own.
    """

    moves: tuple[Move, ...]
    nbytes: int

    @staticmethod
    def of(plan: Sequence[Move], rank: int, sources: Sequence[StateSource]) -> Taking:
        """Of a rank that has these sources itself."""
        others = tuple(move for move in plan if move.rank != rank)
        near = sum(move.nbytes for move in plan if move.rank == rank and not sources[move.source].own)
        return Taking(others, near + sum(move.nbytes for move in others))


def _is_sound(state: Live | Snapshot) -> bool:
    return isinstance(state, Live) or state.copy.is_sound


_Sourced = tuple[int, int, StateSource]
"""A rank, which of its sources, and the source."""


def _valid(offers: Sequence[Offer]) -> list[_Sourced]:
    """The sources that belong to the history of the job: when a mesh began at an earlier step than some rank had done
    before, what was done beyond it has never been."""
    begun: dict[int, int] = {}
    for offer in offers:
        begun |= offer.begun
    return [
        (rank, number, source)
        for rank, offer in enumerate(offers)
        for number, source in enumerate(offer.sources)
        if all(source.point.step <= first for epoch, first in begun.items() if epoch > source.epoch)
    ]


def _possible(
    wanted: Mapping[str, GlobalTensor], offers: Sequence[Offer], sources: Sequence[_Sourced], mesh: Mesh
) -> dict[int, list[Move]]:
    """What this rank would take at each step at which all that it is to have is there."""
    index, me = copy_index(wanted), mesh.rank
    parsed: dict[bytes, dict[str, TensorPiece]] = {}
    found: dict[int, list[Move]] = {}
    for step in {source.point.step for _, _, source in sources}:
        there = [
            (rank, number, offers[rank].indices[each.index])
            for rank, number, each in sources
            if each.point.step == step
        ]
        alike = [number for rank, number, theirs in there if rank == me and theirs == index]
        if alike:  # the very pieces: nothing is worked out, for that is so where nobody but a process was lost
            found[step] = _all_of(wanted, me, alike[0])
            continue
        held: dict[str, list[HeldPiece]] = {}
        for rank, number, theirs in there:
            if theirs not in parsed:  # replicas have the same
                parsed[theirs] = _pieces(theirs)
            for name, piece in parsed[theirs].items():
                held.setdefault(name, []).append(HeldPiece(rank, number, piece))
        plan = moves(me, _pieces(index), held, mesh.degrees.world)
        if plan is not None:
            found[step] = plan
    return found


def _all_of(wanted: Mapping[str, GlobalTensor], rank: int, source: int) -> list[Move]:
    """All from one source."""
    return [
        Move(rank, source, name, (box.offsets, box.sizes), box.numel * piece.dtype.itemsize)
        for name, piece in wanted.items()
        for box in piece.boxes
    ]


def _pieces(index: bytes) -> dict[str, TensorPiece]:
    return {stored.name: stored.piece for stored in stored_pieces(index)}


def _newest_point(step: int, sources: Sequence[_Sourced]) -> RunPoint:
    """That of the first slot, if it is there: it knows whether what followed on the step was reported. Better than a
    copy is the memory, which has gone on."""
    of_step = [each for _, _, each in sources if each.point.step == step]
    return min(of_step, key=lambda each: (each.slot, not each.live, -each.epoch)).point


def begin_anew(stepper: Stepper) -> None:
    """Gives a rank the state before the first step."""
    draw(stepper.parts, stepper.cfg)
    for states in stepper.optimizer.states.values():
        for state in states.values():
            state.zero_()
    for buffer in stepper.parts.buffers.values():
        buffer.zero_()
    stepper.updates.zero_()
