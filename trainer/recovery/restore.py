"""After a fault: the newest step whose state every slot of the new mesh can provide, and all ranks brought to it.

A step that has committed on one rank may not have on another, which was told to leave in the middle of its norm. So
ranks may be a step apart, and the copies of one that died may be older still. Each says which steps it can provide,
from its own memory or from copies on its node; the newest that all have is where they go on, and what some have beyond
it is done again, with the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...parallel.comm.mesh import Mesh
from ..checkpoint.state import all_tensors
from ..metrics.peak import Peak
from ..overlap import ChunkSearch
from ..setup import draw
from ..step import Stepper
from .moving import hand_over, take_over
from .point import RunPoint
from .snapshots import Snapshot, snapshots_on_node


@dataclass(frozen=True)
class Offer:
    """What a rank can provide for its slot.

    Args:
        live: how far the state in its memory is; none: there is none.
        kept: how far its slot's copies on its node are, by step.
        others: the same of other slots' copies there.
        peak, search, resumed: what it knows, and those that come anew do not.
    """

    live: RunPoint | None
    kept: Mapping[int, RunPoint]
    others: Mapping[int, Mapping[int, RunPoint]]
    peak: Peak | None
    search: ChunkSearch | None
    resumed: Path | None

    def at(self, step: int) -> RunPoint | None:
        """How far it would be after a step."""
        return self.live if self.live is not None and self.live.step == step else self.kept.get(step)

    @property
    def steps(self) -> set[int]:
        return {*self.kept, *(() if self.live is None else (self.live.step,))}


class StateRestore:
    """Brings this rank, together with all others of a mesh, to the state of one step: `Session.open`'s `restore`.

    Args:
        folder: where this node's copies are.
        live: how far the state is that this rank brings; none: it brings none, or one that is not whole.
        resumed: the checkpoint that the job went on from, as far as this rank knows.
    """

    def __init__(self, folder: Path, live: RunPoint | None, resumed: Path | None) -> None:
        self._folder, self._live = folder, live
        self.resumed = resumed
        """The checkpoint that the job went on from, if it did."""
        self._on_node: Mapping[int, Mapping[int, Snapshot]] = {}
        self._moves: list[tuple[int, int]] = []
        """(slot, slot that has its copy) where that is on another node, in the order in which they are sent."""
        self.point: RunPoint | None = None
        """Where all ranks are now; none: nowhere, the state is that of a job before its first step."""
        self.furthest = 0
        """The last step that is known to have been done on some rank."""

    def meet(self, mesh: Mesh, peak: Peak | None, search: ChunkSearch | None) -> tuple[Peak | None, ChunkSearch | None]:
        """Agrees on the step, before anything is built.

        Args:
            mesh: the new one.
            peak, search: what this rank has of them.

        Returns:
            What all ranks have of them from now on.
        """
        self._on_node = snapshots_on_node(self._folder)
        points = {slot: {step: copy.point for step, copy in of.items()} for slot, of in self._on_node.items()}
        kept = points.pop(mesh.rank, {})
        offers = mesh.gather_objects(Offer(self._live, kept, points, peak, search, self.resumed))
        steps = [
            {*offer.steps, *(step for each in offers for step in each.others.get(slot, ()))}
            for slot, offer in enumerate(offers)
        ]
        common, self.furthest = set.intersection(*steps), max(max(each, default=0) for each in steps)
        newest = max(common, default=0)
        if common:
            self._moves = [
                (slot, next(other for other, each in enumerate(offers) if newest in each.others.get(slot, ())))
                for slot, offer in enumerate(offers)
                if newest not in offer.steps
            ]
            # The first slot's: it knows whether what followed on the step was reported.
            self.point = offers[0].at(newest) or next(
                each.others[0][newest] for each in offers if newest in each.others.get(0, ())
            )
        self.resumed = next((each.resumed for each in offers if each.resumed is not None), None)
        peaks = (each.peak for each in offers if each.peak is not None)
        searches = (each.search for each in offers if each.search is not None)
        return next(peaks, None), next(searches, None)

    def fill(self, stepper: Stepper) -> None:
        """Fills this rank's state.

        Raises:
            NoSnapshot: what this rank has is of other pieces than the mesh gives it.
        """
        on_node, self._on_node = self._on_node, {}
        slot = stepper.mesh.rank
        if self.point is None:
            begin_anew(stepper)
            return
        step, moved = self.point.step, None
        for to, source in self._moves:
            if source == slot:
                hand_over(on_node[to][step].copy, stepper.mesh.axis("world"), to)
            elif to == slot:
                moved = Snapshot(take_over(self.point, stepper.mesh.axis("world"), source))
        if self._live is None or self._live.step != step:
            tensors = all_tensors(stepper.parts, stepper.optimizer)
            (moved or on_node[slot][step]).fill(tensors)
            stepper.optimizer.loaded(tensors)
            stepper.updates.fill_(float(self.point.progress.updates))


def begin_anew(stepper: Stepper) -> None:
    """Gives a rank the state before the first step."""
    draw(stepper.parts, stepper.cfg)
    for states in stepper.optimizer.states.values():
        for state in states.values():
            state.zero_()
    for buffer in stepper.parts.buffers.values():
        buffer.zero_()
    stepper.updates.zero_()
