"""What one rank does against silent data corruption, in the order of a step:

    begin │ F … BW: gradients final ─ sent │ NORM: check ║ updates │ settled: windows of the state open, until check

`check` stands before the one collective of NORM, which also adds up what was found: so all ranks know it before any of
them updates anything, and then none does.
"""

from __future__ import annotations

import socket

import torch
from torch import Tensor

from ...configs.schema import Config
from ...parallel.checksum import ChecksumWindow, ParameterMemory
from ...parallel.comm.mesh import Mesh
from ...parallel.fingerprints import Fingerprints
from ...parallel.replicas.bucket_guard import BucketGuard
from ...parallel.replicas.flat import FlatReplicas
from ..checkpoint.state import units_by_key
from ..optim.states import Optimizer
from ..setup import Parts
from .copies import CopyComparison
from .findings import ChangedBits, RankFindings, RemadeTensor


class _StateWindows:
    """The windows of one rank's buckets, masters and states."""

    def __init__(self, parts: Parts, optimizer: Optimizer) -> None:
        replicas = parts.replicas
        assert isinstance(replicas, FlatReplicas)  # FSDP2 is refused before
        self._buckets: list[BucketGuard] = replicas.guards()
        resting = optimizer.resting(units_by_key(replicas), list(replicas.pieces()))
        self._states = _by_device(resting, parts.device)

    @property
    def gradients(self) -> list[ChecksumWindow]:
        return [bucket.gradients for bucket in self._buckets]

    @property
    def states(self) -> list[ChecksumWindow]:
        """Of parameters, masters and states."""
        return [window for bucket in self._buckets for window in (bucket.own, bucket.others)] + self._states

    def open(self) -> None:
        """After an update, whose parameters may still be on their way to other ranks."""
        for window in [bucket.own for bucket in self._buckets] + self._states:
            window.open()

    def close(self) -> None:
        for window in self.states:
            window.close()


def _by_device(places: list[ParameterMemory], device: torch.device) -> list[ChecksumWindow]:
    """A window for each device that some of the places are on."""
    devices = dict.fromkeys(place.memory.device for place in places)
    return [ChecksumWindow([place for place in places if place.memory.device == each], device) for each in devices]


class NumericsGuard:
    """The guards of one rank.

    Args:
        cfg: the job, with some of `faults.numerics`.
        parts, optimizer: of this rank, states prepared.
        mesh: of this rank; all ranks make their guards together.
    """

    def __init__(self, cfg: Config, parts: Parts, optimizer: Optimizer, mesh: Mesh) -> None:
        numerics = cfg.faults.numerics
        self._mesh, self._replicas, self._every = mesh, parts.replicas, numerics.replicas_every
        self._copies = None
        if self._every:
            self._copies = CopyComparison(parts.replicas, mesh.rank, parts.device)
        self._windows = _StateWindows(parts, optimizer) if numerics.checksums else None
        self.prints = Fingerprints(mesh.recorder) if numerics.recompute else None
        """Of parts that run a second time."""
        self._open = False
        self._first: int | None = None
        """Updates before the first step that was guarded."""
        self._saved = 0
        """Updates before the newest checkpoint for which nothing was found."""
        self._none = torch.zeros((), dtype=torch.float64, device=parts.device)
        self._all = self._none

    @staticmethod
    def of(cfg: Config, parts: Parts, optimizer: Optimizer, mesh: Mesh) -> NumericsGuard | None:
        """The guard that the job wants."""
        numerics = cfg.faults.numerics
        if not numerics.replicas_every and not numerics.checksums and not numerics.recompute:
            return None
        return NumericsGuard(cfg, parts, optimizer, mesh)

    def begin(self, step: int) -> None:
        """Before a step (from 0 on), which may be the first one."""
        if self._first is None:
            self._first = step
        if self.prints is not None:
            self.prints.begin(step)
        if self._windows is not None and not self._open:
            self._replicas.wait_gathers()
            for window in self._windows.states:
                window.open()
            self._open = True

    def check(self, step: int) -> Tensor:
        """Before the update of a step: how many places of this rank have other bits than they should, fp64 ()."""
        found = self._look(copies=self._every > 0 and step % self._every == 0)
        if self._windows is not None:
            self._windows.close()
        if self.prints is not None:
            found = found + self.prints.differing
        return found

    def check_at_rest(self) -> Tensor:
        """Before the state is saved: the same of the state, which stays under guard, and of all copies; fp64 ()."""
        return self._look(copies=self._every > 0)

    def _look(self, *, copies: bool) -> Tensor:
        found = self._none
        if self._windows is not None:
            for window in self._windows.states:
                window.check()
            windows = self._windows.states + self._windows.gradients
            found = found + torch.cat([window.changed for window in windows]).sum()
        if self._copies is not None and copies:
            found = found + self._copies.compare()
        return found

    def saved(self, step: int) -> None:
        """No rank has found anything in the state after so many updates, which is saved."""
        self._saved = step

    def told(self, found: Tensor) -> Tensor:
        """All that all ranks have found since the start (), with that of the step: whoever trains on does not update,
        though the host may see it a step later."""
        self._all = self._all + found
        return self._all

    def rest(self) -> None:
        """After the update of a step: nothing may change until the next one."""
        if self._windows is not None:
            self._windows.open()

    def forget(self) -> None:
        """The state was or will be changed from outside."""
        self._open = False
        if self._windows is not None:
            self._windows.close()

    def findings(self, step: int) -> RankFindings:
        """What this rank knows of what was found in a step (from 0 on)."""
        first = self._first or 0
        known = max(first, self._saved)
        copies = self._copies.different() if self._copies is not None else ()
        good = [step]
        if copies:
            good.append(max(step - self._every, known))
        changed: list[ChangedBits] = []
        if self._windows is not None:
            sent = f"changed between its last addition and its collective in step {step + 1}"
            since = "the start" if step == first else f"the update of step {step}"
            changed += self._changed(self._windows.gradients, sent)
            state = self._changed(self._windows.states, f"changed between {since} and the update of step {step + 1}")
            if state:
                good.append(max(step - 1, known))
            changed += state
        return RankFindings(
            self._mesh.rank, socket.gethostname(), tuple(changed), copies, min(good), self._remade(step)
        )

    def _changed(self, windows: list[ChecksumWindow], when: str) -> list[ChangedBits]:
        host = socket.gethostname()
        places = [
            window.places[number] for window in windows for number in torch.nonzero(window.changed).view(-1).tolist()
        ]
        return [ChangedBits(self._mesh.rank, host, place.what, place.name, when) for place in places]

    def _remade(self, step: int) -> tuple[RemadeTensor, ...]:
        """What second runs of a step made otherwise."""
        if self.prints is None:
            return ()
        dp = self._mesh.axis("dp")
        return tuple(
            RemadeTensor(each.part, each.number, each.tensor, each.microbatch, each.microbatch * dp.size + dp.rank)
            for each in self.prints.mismatches(step)
        )
