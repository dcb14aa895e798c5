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
from .point import RunPoint
from .snapshots import Snapshot, snapshots_of


@dataclass(frozen=True)
class Offer:
    """What a rank can provide for its slot.

    Args:
        live: how far the state in its memory is; none: there is none.
        kept: how far its copies are, by step.
        peak, search, resumed: what it knows, and those that come anew do not.
    """

    live: RunPoint | None
    kept: Mapping[int, RunPoint]
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
        self._kept: Mapping[int, Snapshot] = {}
        self.point: RunPoint | None = None
        """Where all ranks are now; none: nowhere, the state is that of a job before its first step."""
        self.redone = 0
        """Steps that some rank had done beyond it."""

    def meet(self, mesh: Mesh, peak: Peak | None, search: ChunkSearch | None) -> tuple[Peak | None, ChunkSearch | None]:
        """Agrees on the step, before anything is built.

        Args:
            mesh: the new one.
            peak, search: what this rank has of them.

        Returns:
            What all ranks have of them from now on.
        """
        self._kept = snapshots_of(self._folder, mesh.rank)
        points = {step: each.point for step, each in self._kept.items()}
        offers = mesh.gather_objects(Offer(self._live, points, peak, search, self.resumed))
        common = set.intersection(*(offer.steps for offer in offers))
        furthest = max((step for offer in offers for step in offer.steps), default=0)
        newest = max(common, default=0)
        # The first slot's: it knows whether what followed on the step was reported.
        self.point, self.redone = offers[0].at(newest) if common else None, furthest - newest
        self.resumed = next((each.resumed for each in offers if each.resumed is not None), None)
        peaks = (each.peak for each in offers if each.peak is not None)
        searches = (each.search for each in offers if each.search is not None)
        return next(peaks, None), next(searches, None)

    def fill(self, stepper: Stepper) -> None:
        """Fills this rank's state.

        Raises:
            NoSnapshot: what this rank has is of other pieces than the mesh gives it.
        """
        kept, self._kept = self._kept, {}
        if self.point is None:
            draw(stepper.parts, stepper.cfg)
            for states in stepper.optimizer.states.values():
                for state in states.values():
                    state.zero_()
            for buffer in stepper.parts.buffers.values():
                buffer.zero_()
            stepper.updates.zero_()
        elif self._live is None or self._live.step != self.point.step:
            tensors = all_tensors(stepper.parts, stepper.optimizer)
            kept[self.point.step].fill(tensors)
            stepper.optimizer.loaded(tensors)
            stepper.updates.fill_(float(self.point.progress.updates))
