"""The ranks of one node as its watcher sees them: who is there, what is wrong with whom, where they stand."""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from ...parallel.record.files import RingFile, collect, record_folder
from ...parallel.record.patience import Patience
from ...parallel.record.reader import RecordError
from ...parallel.record.ring import ring_folders, ring_name
from ...parallel.record.stacks import read_stacks, stacks_file, telling
from ...parallel.record.stand import Condition, Stand
from ...trainer.processes.failure import drop_unfinished_failure, read_failure
from ...trainer.processes.watch import WatchRequest
from .watched import WatchedRank, still_standing
from .worker_files import processes

_GATHER_S = 0.05
_NEAR_S = 5.0
"""For the ranks that follow the first one of a node to be there; then any ring of the job on this host counts."""
_STACKS_S = 0.15
"""For the ranks to write down their stacks."""


class NodeRanks:
    """The ranks of a node, by their slots in the job's mesh, and those that are ready to take a slot.

    Args:
        request: what to watch.
        host: for words.
        folder: of a launcher, in which the node's ranks leave their ids; none: they are found by their rings.
    """

    def __init__(self, request: WatchRequest, host: str, folder: Path | None = None) -> None:
        self.request, self.host, self._folder = request, host, folder
        self.run_dir = Path(request.run_dir)
        self.slots: dict[int, WatchedRank] = {}
        self.spares: dict[int, WatchedRank] = {}
        """By their numbers in the job."""
        self.coming: dict[int, int] = {}
        """The slot of each number whose ring is not there yet, once processes have taken others' places."""
        self.spares_coming: set[int] = set()
        self.codes: dict[int, int] = {}
        """Exit codes, by number, of processes of which the watcher is told."""
        self._epoch = 0
        self._slots_here = request.local
        """How many slots of the mesh are on this node."""
        self._gathered = 0.0
        self._near_until = time.monotonic() + _NEAR_S

    # Who is there -----------------------------------------------------------------------------------------------

    def gather(self, now: float) -> None:
        """Looks for those that are not there yet."""
        if self.complete or now - self._gathered < _GATHER_S:
            return
        self._gathered = now
        for number, slot in self._expected(now).items():
            if (found := self._open(number)) is not None:
                self.slots[slot] = found
                if self.coming.pop(number, None) is not None:
                    found.goes_to(slot, self._epoch, now)
        for number in sorted(self.spares_coming):
            if (found := self._open(number)) is not None:
                self.spares_coming.discard(number)
                self.spares[number] = found

    @property
    def complete(self) -> bool:
        """Whether all that are expected are there."""
        return len(self.slots) >= self._slots_here and not self.coming and not self.spares_coming

    def _expected(self, now: float) -> dict[int, int]:
        """The slot of each number that is looked for."""
        request = self.request
        if self._epoch or len(self.slots) >= request.local:
            return dict(self.coming)
        if self._folder is not None:
            return {n: n for n in processes(self._folder) if n < request.world and n not in self.slots}
        # Ranks of a node are neighbours; where they are not, it is these rings that are on this host.
        near = range(request.rank, min(request.rank + request.local, request.world))
        first = near if now < self._near_until else range(request.world)
        return {number: number for number in first if number not in self.slots}

    def _open(self, number: int) -> WatchedRank | None:
        limits = self.request.alive_s, self.request.hang_s, self.request.pause_s
        for folder in ring_folders():
            path = folder / ring_name(self.request.stem, number)
            if path.exists():
                with contextlib.suppress(OSError, RecordError):
                    return WatchedRank(path, Patience(*limits), self.host)
        return None

    def live(self) -> list[WatchedRank]:
        """Those in a slot that have not ended."""
        return [rank for rank in self.slots.values() if not rank.ended]

    def abort(self, epoch: int) -> None:
        """Tells all to leave whatever they wait for in the mesh of an epoch."""
        for rank in self.live():
            rank.abort(epoch)

    def register(self, poll: select.poll) -> None:
        """Makes a `poll` wake up at their ends."""
        for rank in (*self.live(), *self.spares.values()):
            if rank.pidfd is not None and not rank.ended:
                poll.register(rank.pidfd, select.POLLIN)

    def look(self, ready: set[int], now: float) -> None:
        """Notes what has changed.

        Args:
            ready: descriptors that are.
            now: monotonic seconds.
        """
        for rank in (*self.live(), *(spare for spare in self.spares.values() if not spare.ended)):
            if rank.pidfd is None or rank.pidfd in ready:
                rank.has_ended()
            rank.look(now)

    # What is wrong ----------------------------------------------------------------------------------------------

    def conditions(self) -> dict[int, Condition]:
        """What is wrong with which slot."""
        found = {slot: self._condition(rank) for slot, rank in self.slots.items()}
        dead = {slot: Condition.DEAD for number, slot in self.coming.items() if number in self.codes}
        return {slot: condition for slot, condition in found.items() if condition is not None} | dead

    def _condition(self, rank: WatchedRank) -> Condition | None:
        if rank.ended:
            if rank.failed:
                return self._failure(rank)
            return Condition.DONE if rank.done else Condition.DEAD
        if rank.failed:
            return self._failure(rank)
        if not rank.done and rank.silent(time.monotonic()):
            return Condition.STOPPED if rank.state() in ("T", "t") else Condition.FROZEN
        return None

    def _failure(self, rank: WatchedRank) -> Condition:
        if not rank.line:
            failure = read_failure(self.run_dir, rank.number)
            rank.line = failure.lines[0] if failure is not None else "it did not say why"
            rank.told_lost = failure is not None and failure.lost
            rank.by_user = failure is not None and failure.user
        return Condition.LOST if rank.told_lost else Condition.FAILED

    def stands(self, now: float) -> dict[int, Stand]:
        """Where they stand."""
        conditions, stands = self.conditions(), dict[int, Stand]()
        for slot, rank in self.slots.items():
            with contextlib.suppress(OSError, RecordError):
                stands[slot] = rank.stand(now, conditions.get(slot, Condition.RUNS))
        never_came = {
            slot: Stand(slot, self.host, condition=Condition.DEAD, phase="start", code=self.codes[number])
            for number, slot in self.coming.items()
            if number in self.codes
        }
        return still_standing(stands, self.slots) | never_came

    def with_stacks(self, stands: dict[int, Stand]) -> dict[int, Stand]:
        """Where they stand, with Python's stacks of those that can show them."""
        folder = record_folder(self.run_dir)
        running = (Condition.RUNS, Condition.FROZEN, Condition.LOST)
        asked = {slot for slot, stand in stands.items() if stand.condition in running and slot in self.slots}
        asked = {slot for slot in asked if self.slots[slot].ask_stacks()}
        files = {slot: stacks_file(folder, self.slots[slot].number) for slot in asked}
        sizes: dict[int, int] = {}
        until = time.monotonic() + _STACKS_S
        while time.monotonic() < until:
            time.sleep(0.01)
            now = {slot: file.stat().st_size if file.exists() else 0 for slot, file in files.items()}
            if now == sizes and all(now.values()):
                break
            sizes = now
        found = {slot: read_stacks(file) for slot, file in files.items()}
        return {
            slot: replace(stand, stack=telling(found.get(slot, []), stand.phase, stand.writer_s > 0))
            for slot, stand in stands.items()
        }

    # Who follows whom -------------------------------------------------------------------------------------------

    def follow(self, epoch: int, members: dict[int, int], spares: Collection[int], now: float) -> None:
        """Takes note of who is in which slot of this node from now on.

        Args:
            epoch: of the next mesh.
            members: the number in each slot of this node.
            spares: the numbers in no slot.
            now: monotonic seconds.
        """
        self._epoch, self._slots_here = epoch, len(members)
        before = {rank.number: rank for rank in self.slots.values()}
        kept = {slot: before.get(number) or self.spares.pop(number, None) for slot, number in members.items()}
        self.coming = {members[slot]: slot for slot, rank in kept.items() if rank is None}
        self.spares_coming -= set(self.coming)
        self.slots = {slot: rank for slot, rank in kept.items() if rank is not None}
        for slot, rank in self.slots.items():
            rank.goes_to(slot, epoch, now)
        for number, rank in before.items():
            if number in spares:
                rank.slot = -1
                self.spares[number] = rank

    def tidy(self, ranks: list[WatchedRank]) -> None:
        """Keeps the records of ranks that died without doing so, and leaves nothing else of them."""
        for rank in ranks:
            slot = rank.slot if rank.slot >= 0 else rank.number
            ring = RingFile(slot, self.host, str(rank.path), rank.header.pid, rank.epoch, rank.number)
            file = stacks_file(record_folder(self.run_dir), rank.number)
            with contextlib.suppress(OSError):
                drop_unfinished_failure(self.run_dir, rank.header.pid)
                collect(self.run_dir, [ring], remove=True)
                if not file.stat().st_size:
                    file.unlink()
