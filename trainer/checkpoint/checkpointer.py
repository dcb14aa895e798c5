"""Checkpoints: any layout saves, any layout loads; written in the background, verified, published atomically.

Tensors lie under global names in safetensors files, with an index of their boxes in JSON; a folder has its final name
only when it is complete, and a census of names and shapes precedes every load. See docs/checkpoints.md.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...configs.errors import Problem, UserError
from ...parallel.comm.host_tree import HostTree
from ...parallel.comm.waiting import Abort, Aborted
from ...parallel.global_tensor import GlobalTensor
from ...parallel.record import kinds
from ...parallel.record.ring import Recorder
from ..processes.threads import Beside
from . import files
from .io import Save, read_full, read_together, write_full, write_together
from .names import step_folder
from .retention import Retention, retain
from .stored import StoredTensor
from .team import CheckpointError, Team
from .telling import Telling
from .tensors import PlannedFile, index_of, plan_files
from .tiers.local import LOCAL, NodeFolders
from .tiers.search import CheckpointTier, expect_there, newest_verified, verified_state
from .verification import verify
from .writers import Holding, HostBuffers, Write, assign

__all__ = ["CheckpointError", "Checkpointer", "read_full", "verify", "write_full"]


@dataclass(frozen=True)
class _Layout:
    """What this rank writes at every save, as long as no rank's pieces change."""

    writes: list[Write]
    files: list[PlannedFile]
    index: Mapping[str, StoredTensor]
    buffers: HostBuffers


class Checkpointer:
    """Saves and loads one job's checkpoints. Every rank makes one and calls its methods in the same order.

    Args:
        directory: where checkpoints are published, on storage that every rank sees.
        group: of all ranks, that nothing else uses (saving runs in a thread beside the step's communication); None for
            one process.
        rank, world: this process in the group.
        keep: which checkpoints stay when a new one is there.
        asynchronous: whether `save` returns when the tensors are copied, or when the checkpoint is published.
        on_event: called on rank 0 with `checkpoint_saved`, `checkpoint_failed`, `checkpoint_skipped`,
            `checkpoint_damaged` and `checkpoint_not_removed`; from the writing thread, if `asynchronous`.
        abort: ends the waits for the other ranks and for the thread that writes.
        recorder: of the rank.
        nodes: where the ranks of each node write a checkpoint of their own, into a `directory` that only they see.
    """

    def __init__(
        self,
        directory: Path,
        *,
        group: HostTree | None,
        rank: int,
        world: int,
        keep: Retention,
        asynchronous: bool,
        on_event: Callable[[dict[str, Any]], None],
        abort: Abort | None = None,
        recorder: Recorder | None = None,
        nodes: NodeFolders | None = None,
    ) -> None:
        if group is None and world != 1:
            raise ValueError(f"{world} ranks need a process group")
        self.directory = Path(directory)
        # The watcher follows one save of a rank, that of the checkpoints that all ranks see.
        vitals = self._vitals = recorder.vitals if recorder is not None and nodes is None else None
        hosts = () if nodes is None else nodes.hosts
        meets = bool if vitals is None else vitals.meets
        self._nodes, self._team = nodes, Team(group, rank, world, abort, meets, hosts)
        self._keep, self.telling = keep, Telling(on_event, first=rank == 0, tier=None if nodes is None else LOCAL)
        self._recorder = recorder.fork() if recorder is not None else None
        self._writer = Beside("checkpoint") if asynchronous else None
        self.beside: Mapping[str, bytes] = {}
        """Small files that every checkpoint has beside its tensors, by name; rank 0's are written."""
        self._newest: int | None = None
        self._writing: tuple[int, float] | None = None
        """Step of the save that was begun last, and when."""
        self.copied_s = 0.0
        """Seconds that the last save held up for its copy of the tensors."""
        self._error: CheckpointError | None = None
        self._holdings: dict[str, Holding] | None = None
        self._layout = _Layout([], [], {}, HostBuffers([], pinned=False))

    @property
    def newest(self) -> int | None:
        """Step of the last save, unless it failed, or of the checkpoint in `directory` that was loaded whole.

        Waits for what is being written: only then do all ranks know the same.
        """
        self._join()
        return self._newest

    @property
    def busy(self) -> bool | None:
        """Whether this rank still writes the last save; None, on all ranks alike: none was begun beside the step."""
        return None if self._writer is None or self._writing is None else not self._writer.idle

    def pass_over(self, step: int) -> None:
        """Says that a step is not saved, because a save before it is still being written."""
        before, began = self._writing or (step, time.monotonic())
        reason = f"the save of step {before} is still being written, for {time.monotonic() - began:.1f} s"
        self.telling.event("checkpoint_skipped", step=step, path=str(step_folder(self.directory, step)), reason=reason)
        self.telling.say(
            f"step {step} is not saved: {reason}; a larger checkpoint.every, or faster storage, saves each in time"
        )

    def look_for(self, step: int) -> None:
        """Finds out whether this very run has saved a step before a fault."""
        folder = step_folder(self.directory, step)
        there = self._team.agree("looking for a checkpoint", lambda: not self._team.leads or folder.is_dir(), all)
        self._newest = step if there else None

    # Saving -----------------------------------------------------------------------------------------------------

    def prepare(self, tensors: Mapping[str, GlobalTensor]) -> None:
        """Plans the first save and makes its host buffers, so that it holds a step up no longer than the others.

        The kernel gives memory when it is first written to, which takes longer than the copy: that is done beside the
        first steps. What fails here fails again, and is told, when it is wanted.
        """
        self._join()  # a save that is being written talks to the other ranks, as planning does
        with suppress(CheckpointError):
            self._plan(tensors)
            if self._writer is not None:
                self._writer.run(self._layout.buffers.touch)

    def save(self, step: int, tensors: Mapping[str, GlobalTensor], state: Mapping[str, Any]) -> None:
        """Saves the tensors' values of now as the checkpoint of `step`.

        Waits for the previous save first. A rank passes what it holds: names differ between ranks where nothing is
        held, replicas are written once. A save that fails (a full disk, no memory) is told at once, costs only this
        checkpoint, and is raised by `wait` if no later one succeeds.

        Args:
            tensors: by global name.
            state: JSON values, the same on every rank; rank 0's are kept.
        """
        self._layout.buffers.want()
        self._join()
        self._error = None
        started = time.monotonic()
        folder = step_folder(self.directory, step)
        try:
            self._plan(tensors)
        except CheckpointError as error:
            self._failed(step, folder, error)
            return
        layout, problem, kept = self._layout, None, {}
        try:
            kept = json.loads(json.dumps({"step": step, **state}, allow_nan=False))
            before = time.monotonic()
            layout.buffers.fill(layout.writes, tensors)
            self.copied_s = time.monotonic() - before
        except Exception as error:  # told to the other ranks, which are on their way into the write
            problem = error
        save = Save(
            folder,
            layout.writes,
            layout.buffers.tensors,
            layout.files,
            layout.index,
            kept,
            problem,
            self._nodes,
            self.beside,
        )
        self._writing = step, started
        # Until it is known to have ended well: a writer without memory cannot even say what is wrong.
        self._newest = None
        self._error = CheckpointError(f"saving {folder}: the writing thread ran out of memory")
        times = {"blocked_s": round(time.monotonic() - started, 3), "copy_s": round(self.copied_s, 3)}
        if self._writer is not None:
            self._writer.run(lambda: self._run(save, step, times))
        else:
            self._run(save, step, times)

    def _plan(self, tensors: Mapping[str, GlobalTensor]) -> None:
        """Deals out who writes what, again only when any rank's layout has changed."""
        holdings: dict[str, Holding] = {}

        def changed() -> bool:
            holdings.update({name: Holding.of(tensor) for name, tensor in tensors.items()})
            return holdings != self._holdings

        if not self._team.agree("saving", changed, any):
            return
        self._holdings = None
        everyone = self._team.together("saving", lambda: holdings)
        self._team.each("saving", lambda: self._allocate(everyone))
        self._holdings = holdings

    def _allocate(self, everyone: list[dict[str, Holding]]) -> None:
        rank, own = self._team.rank, self._team.sharing
        seen = [held if other in own else {} for other, held in enumerate(everyone)]
        writes = assign(seen, complete=not self._team.apart)
        mine = writes[rank]
        # The old buffers go before the new ones come.
        self._layout = _Layout([], [], {}, HostBuffers([], pinned=False))
        buffers = HostBuffers(mine, pinned=any(h.pinned for h in everyone[rank].values()))
        self._layout = _Layout(mine, plan_files(rank, mine), index_of(writes) if self._team.leads else {}, buffers)

    def _run(self, save: Save, step: int, times: Mapping[str, float]) -> None:
        if self._vitals is not None:
            self._vitals.writes(True)
        try:
            self._write(save, step, times)
        finally:
            if self._vitals is not None:
                self._vitals.writes(False)

    def _write(self, save: Save, step: int, times: Mapping[str, float]) -> None:
        started = time.monotonic()
        try:
            with self._recorded(step):
                done = write_together(self._team, save)
        except Aborted:
            return  # the job ends, and why is told elsewhere
        except BaseException as error:
            self._failed(
                step, save.folder, error if isinstance(error, CheckpointError) else CheckpointError(repr(error))
            )
            return
        self._newest, self._error = step, None
        seconds = round(time.monotonic() - started, 3)
        about = {"step": step, "path": str(save.folder)}
        bad = {"not_finite": list(done.not_finite)} if done.not_finite else {}
        self.telling.event("checkpoint_saved", **about, bytes=done.size, seconds=seconds, **times, **bad)
        if bad:
            first, more = done.not_finite[0], len(done.not_finite) - 1
            self.telling.say(
                f"step {step} is saved with NaN or infinite values in {first}{f' and {more} more' if more else ''}; "
                "it removes no older checkpoint, and checkpoint.resume=latest prefers the last one without"
            )
        if self._team.leads:
            self._tidy(save.folder)

    def _tidy(self, newest: Path) -> None:
        """Removes what is not kept. What fails costs nothing but its room, and is tried again after the next save."""
        try:
            left = [*files.clean(self.directory), *retain(self.directory, newest, self._keep)]
        except OSError as error:
            left = [f"{self.directory} ({error})"]
        for one in left:
            self.telling.event("checkpoint_not_removed", reason=one)
            self.telling.say(f"could not be removed: {one}; it takes room, and costs nothing else")

    def _recorded(self, step: int) -> AbstractContextManager[object]:
        if self._recorder is None:
            return nullcontext()
        self._recorder.context = step, 0, -1
        return self._recorder.span(self._recorder.intern(kinds.WRITE))

    def _failed(self, step: int, folder: Path, error: CheckpointError) -> None:
        self._newest, self._error = None, error
        self.telling.event("checkpoint_failed", step=step, path=str(folder), reason=str(error))
        self.telling.say(f"step {step} is not saved: {error}; what was saved before is untouched")

    def _join(self) -> None:
        if self._writer is not None:
            self._writer.join(self._team.abort)

    def wait(self) -> None:
        """Returns when nothing is being written.

        Raises:
            CheckpointError: the last save failed; raised once.
        """
        self._join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Waits, frees the host buffers and ends the writing thread. What failed has been told."""
        with suppress(Aborted):
            self._join()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._holdings, self._layout = None, _Layout([], [], {}, HostBuffers([], pinned=False))

    def retire(self) -> None:
        """Removes what this run has saved here, which somewhere else has newer."""
        self._join()
        if self._team.leads:
            with suppress(OSError):
                files.remove(self.directory)
                self.directory.parent.rmdir()  # of the run; another host's folder may be in it

    # Loading ----------------------------------------------------------------------------------------------------

    def load(
        self,
        path: Path,
        tensors: Mapping[str, GlobalTensor],
        *,
        prefix: str = "",
        cast: bool = False,
        left: str | None = None,
    ) -> dict[str, Any]:
        """Loads a checkpoint's tensors in place and returns its state.

        Args:
            path: a checkpoint that `find_resume` has verified.
            tensors: by global name; a rank passes what it holds.
            prefix: only the checkpoint's tensors of these names count (`model/`: weights only).
            cast: convert to the dtype of `tensors`, instead of refusing another one.
            left: tensors of the checkpoint whose names end so may be left over.

        Raises:
            UserError: a tensor is missing or left over, or has another shape or dtype; nothing has been loaded.
            CheckpointError: reading failed.
        """
        self._join()
        state = read_together(self._team, Path(path), tensors, prefix, cast, left)
        if not prefix and Path(path).resolve().parent == self.directory.resolve():
            self._newest = int(state["step"])
        return state

    def state(self, path: Path) -> dict[str, Any]:
        """The state of a checkpoint that `find_resume` or `verified` has verified.

        Raises:
            UserError: it is damaged.
        """
        return verified_state(self._team, path)

    @property
    def tier(self) -> CheckpointTier:
        """Its checkpoints as they are now; looked at when nothing is being written."""
        self._join()
        return CheckpointTier(
            self.directory, self._team, self.telling, None if self._nodes is None else self._nodes.run
        )

    def find_resume(self, resume: str | Path) -> Path | None:
        """The verified checkpoint to go on from: every byte of it was read and compared, each rank its share.

        Args:
            resume: `latest` (in the directory of this checkpointer), or the path of one checkpoint.

        Returns:
            None if `latest` finds no checkpoint at all.

        Raises:
            UserError: the named checkpoint is absent or damaged, or `latest` finds only damaged ones.
        """
        if str(resume) != "latest":
            return self.verified(Path(resume), "checkpoint.resume")
        found = newest_verified([self.tier])
        return found[1] if found is not None else None

    def verified(self, path: Path, key: str) -> Path:
        """`path`, after every byte of the checkpoint was read and compared, each rank its share.

        Args:
            path: one checkpoint.
            key: the config key that named it, for the error.

        Raises:
            UserError: it is absent or damaged.
        """
        expect_there(self._team, path, key)
        problems = self.tier.problems(path)
        if problems:
            raise UserError(Problem(key, f"{path} is damaged: {'; '.join(problems)}"))
        return path
