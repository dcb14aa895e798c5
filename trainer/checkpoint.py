"""Checkpoints: any layout saves, any layout loads; written in the background, verified, published atomically.

The tensors are in the format of torch's distributed checkpoint (DCP), under global names. What DCP lacks is here and in
`checkpoint_files.py`: checksums, a folder that has its final name only when it is complete, and a strict census of
names and shapes. See docs/checkpoints.md.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..configs.errors import Problem, UserError
from ..parallel.global_tensor import GlobalTensor
from . import checkpoint_files as files
from .checkpoint_files import verify
from .checkpoint_io import (
    CheckpointError,
    Save,
    Team,
    hush_single_process,
    read_full,
    read_together,
    write_full,
    write_together,
)
from .checkpoint_plan import Holding, HostBuffers, Write, assign

__all__ = ["CheckpointError", "Checkpointer", "read_full", "verify", "write_full"]


class Checkpointer:
    """Saves and loads one job's checkpoints. Every rank makes one and calls its methods in the same order.

    Args:
        directory: where checkpoints are published, on storage that every rank sees.
        group: a gloo process group over all ranks that nothing else uses (saving runs in a thread beside the step's
            communication); None for one process.
        rank, world: this process in the group.
        keep: newest checkpoints kept; 0: all.
        asynchronous: whether `save` returns when the tensors are copied, or when the checkpoint is published.
        on_event: called on rank 0 with `checkpoint_saved`, `checkpoint_failed` and `checkpoint_damaged`; from the
            writing thread, if `asynchronous`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        group: dist.ProcessGroup | None,
        rank: int,
        world: int,
        keep: int,
        asynchronous: bool,
        on_event: Callable[[dict[str, Any]], None],
    ) -> None:
        if group is None and world != 1:
            raise ValueError(f"{world} ranks need a process group")
        self.directory = Path(directory)
        self._team = Team(group, rank, world)
        self._keep, self._asynchronous, self._on_event = keep, asynchronous, on_event
        self.newest: int | None = None
        """Step of the last save, unless it failed, or of the checkpoint in `directory` that was loaded whole."""
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        self._holdings: dict[str, Holding] | None = None
        self._writes: list[Write] = []
        self._buffers = HostBuffers([], pinned=False)
        if group is None:
            hush_single_process()

    # Saving -----------------------------------------------------------------------------------------------------

    def save(self, step: int, tensors: Mapping[str, GlobalTensor], state: Mapping[str, Any]) -> None:
        """Saves the tensors' values of now as the checkpoint of `step`.

        Waits for the previous save first. A rank passes what it holds: names differ between ranks where nothing is
        held, replicas are written once.

        Args:
            tensors: by global name.
            state: JSON values, the same on every rank; rank 0's are kept.

        Raises:
            CheckpointError: the previous save failed (or this one, unless asynchronous). A later call tries anew.
        """
        self.wait()
        started = time.monotonic()
        self._plan(tensors)
        problem, kept = None, {}
        try:
            kept = json.loads(json.dumps({"step": step, **state}))
            self._buffers.fill(self._writes, tensors)
        except Exception as error:  # told to the other ranks, which are on their way into the write
            problem = error
        folder = files.step_folder(self.directory, step)
        save = Save(folder, self._writes, self._buffers.tensors, kept, problem)
        blocked = time.monotonic() - started
        self.newest = step
        if self._asynchronous:
            # A daemon: a process that dies of an error does not stay for a write that other ranks cannot finish.
            self._thread = threading.Thread(
                target=self._run, args=(save, step, blocked), name="checkpoint", daemon=True
            )
            self._thread.start()
        else:
            self._run(save, step, blocked)
            self.wait()

    def _plan(self, tensors: Mapping[str, GlobalTensor]) -> None:
        """Deals out who writes what, again only when any rank's layout has changed."""
        holdings = {name: Holding.of(tensor) for name, tensor in tensors.items()}
        changed = holdings != self._holdings
        if not any(self._team.together("saving", lambda: changed)):
            return
        self._holdings = None
        everyone = self._team.together("saving", lambda: holdings)
        self._team.together("saving", lambda: self._allocate(everyone))
        self._holdings = holdings

    def _allocate(self, everyone: list[dict[str, Holding]]) -> None:
        mine = everyone[self._team.rank]
        self._writes = assign(everyone)[self._team.rank]
        self._buffers = HostBuffers([], pinned=False)  # the old ones go before the new ones come
        self._buffers = HostBuffers(self._writes, pinned=any(h.pinned for h in mine.values()))

    def _run(self, save: Save, step: int, blocked: float) -> None:
        started = time.monotonic()
        about = {"step": step, "path": str(save.folder)}
        try:
            size = write_together(self._team, save)
            seconds = round(time.monotonic() - started, 3)
            self._tell("checkpoint_saved", **about, bytes=size, seconds=seconds, blocked_s=round(blocked, 3))
            self._team.first("removing old checkpoints", lambda: self._remove_old(save.folder))
        except BaseException as error:
            self.newest = None
            self._error = error if isinstance(error, CheckpointError) else CheckpointError(repr(error))
            self._tell("checkpoint_failed", **about, reason=str(self._error))

    def _remove_old(self, newest: Path) -> None:
        files.clean(self.directory)
        files.retain(self.directory, newest, self._keep)

    def _tell(self, event: str, **about: Any) -> None:
        if self._team.rank == 0:
            self._on_event({"event": event, **about})

    def wait(self) -> None:
        """Returns when nothing is being written.

        Raises:
            CheckpointError: the save failed; raised once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Waits, and frees the host buffers.

        Raises:
            CheckpointError: the last save failed.
        """
        try:
            self.wait()
        finally:
            self._buffers, self._holdings, self._writes = HostBuffers([], pinned=False), None, []

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
        self.wait()
        state = read_together(self._team, Path(path), tensors, prefix, cast, left)
        if not prefix and Path(path).resolve().parent == self.directory.resolve():
            self.newest = int(state["step"])
        return state

    def find_resume(self, resume: str | Path) -> Path | None:
        """The verified checkpoint to go on from: every byte of it was read and compared, each rank its share.

        Args:
            resume: `latest` (in the directory of this checkpointer), or the path of one checkpoint.

        Returns:
            None if `latest` finds no checkpoint at all.

        Raises:
            UserError: the named checkpoint is absent or damaged, or `latest` finds only damaged ones.
        """
        self.wait()
        if str(resume) != "latest":
            return self.verified(Path(resume), "checkpoint.resume")
        found = self._team.first("resuming", self._clean_and_list)
        for _, path in found:
            problems = self._verify(path)
            if not problems:
                return path
            reason = "; ".join(problems)
            self._tell("checkpoint_damaged", path=str(path), reason=reason)
            if self._team.rank == 0:
                print(f"pentad: {path} is damaged, using the one before: {reason}", file=sys.stderr, flush=True)
        if found:
            raise UserError(
                Problem(
                    "checkpoint.resume",
                    f"all {len(found)} checkpoints in {self.directory} are damaged; move them away to start afresh, "
                    "or name a good one",
                )
            )
        return None

    def verified(self, path: Path, key: str) -> Path:
        """`path`, after every byte of the checkpoint was read and compared, each rank its share.

        Args:
            path: one checkpoint.
            key: the config key that named it, for the error.

        Raises:
            UserError: it is absent or damaged.
        """
        self.wait()
        self._team.first("verifying", lambda: _must_exist(path, key))
        problems = self._verify(path)
        if problems:
            raise UserError(Problem(key, f"{path} is damaged: {'; '.join(problems)}"))
        return path

    def _clean_and_list(self) -> list[tuple[int, Path]]:
        files.clean(self.directory)
        return files.checkpoints(self.directory)

    def _verify(self, path: Path) -> list[str]:
        def manifest() -> dict[str, files.FileSum] | str:
            try:
                return files.read_manifest(path)
            except files.Damaged as error:
                return str(error)

        known = self._team.first("verifying", manifest)
        if isinstance(known, str):
            return [known]
        # Largest first, dealt out in turn: shares of about the same bytes.
        order = sorted(known, key=lambda name: (-known[name].size, name))
        share = {name: known[name] for name in order[self._team.rank :: self._team.world]}
        problems = self._team.together("verifying", lambda: files.differences(path, share))
        return sorted(problem for part in problems for problem in part)


def _must_exist(path: Path, key: str) -> None:
    if path.is_dir() and not (path / files.MANIFEST).exists() and files.checkpoints(path):
        newest = files.checkpoints(path)[0][1]
        raise UserError(Problem(key, f"{path} is a folder of checkpoints; name one, such as {newest}"))
    if not path.is_dir():
        near = [str(p) for _, p in files.checkpoints(path.parent)[:3]]
        hint = f"; there are {', '.join(near)}" if near else ""
        raise UserError(Problem(key, f"{path} does not exist{hint}"))
