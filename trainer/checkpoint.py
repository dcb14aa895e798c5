"""Checkpoints: any layout saves, any layout loads; written in the background, verified, published atomically.

The tensors are in the format of torch's distributed checkpoint (DCP), under global names. What DCP lacks is here and in
`checkpoint_files.py`: checksums, a folder that has its final name only when it is complete, and a strict census of
names and shapes.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ..configs.errors import Problem, UserError
from ..parallel.global_tensor import GlobalTensor
from . import checkpoint_files as files
from .checkpoint_plan import Holding, HostBuffers, ParallelReader, PlannedSave, Write, assign, writer

T = TypeVar("T")
verify = files.verify
_SHOWN = 8
"""Mistakes of one kind that are listed one by one."""


class CheckpointError(Exception):
    """A save or load failed for a reason other than the user's input (disk full, a rank lost): every rank raises it."""


@dataclass(frozen=True)
class _Team:
    """The ranks that save and load together."""

    group: dist.ProcessGroup | None
    rank: int
    world: int

    def together(self, what: str, fn: Callable[[], T]) -> list[T]:
        """Every rank's result of `fn`, on every rank, or on every rank the error of any.

        Raises:
            UserError: one was raised.
            CheckpointError: anything else was raised, or a rank is lost.
        """
        result, error = None, None
        try:
            result = fn()
        except UserError as mistake:
            error = mistake
        except Exception as failure:
            error = f"rank {self.rank}: {type(failure).__name__}: {failure}"
        answers: list[Any] = [(result, error)]
        if self.group is not None:
            answers = [None] * self.world
            try:
                dist.all_gather_object(answers, (result, error), group=self.group)
            except Exception as lost:
                raise CheckpointError(f"{what}: a rank is lost ({error or lost})") from lost
        mistakes = list(dict.fromkeys(p for _, e in answers if isinstance(e, UserError) for p in e.problems))
        if mistakes:
            raise UserError(*mistakes)
        failures = [e for _, e in answers if e is not None]
        if failures:
            raise CheckpointError(f"{what}: {'; '.join(failures)}")
        return [r for r, _ in answers]

    def first(self, what: str, fn: Callable[[], T]) -> T:
        """Rank 0's result of `fn`, which only rank 0 calls."""
        return self.together(what, fn if self.rank == 0 else lambda: None)[0]  # pyright: ignore[reportReturnType]


_ALONE = _Team(None, 0, 1)


@dataclass(frozen=True)
class _Save:
    """One rank's part of a checkpoint to be written; nothing in it changes any more."""

    folder: Path
    writes: Sequence[Write]
    data: Sequence[Tensor]
    state: Mapping[str, Any]
    problem: Exception | None = None


def _write(team: _Team, save: _Save) -> int:
    """Writes and publishes a checkpoint together; returns its bytes.

    Raises:
        CheckpointError: on every rank; what was there before is untouched.
    """
    tmp = files.temporary(save.folder)

    def prepare() -> None:
        if save.problem is not None:
            raise save.problem
        if team.rank == 0:
            save.folder.parent.mkdir(parents=True, exist_ok=True)
            files.clean(save.folder.parent)
            files.remove(tmp)
            tmp.mkdir()

    def read_back() -> dict[str, files.FileSum]:
        wrong = files.differences(tmp, sums.sums)
        if wrong:
            raise files.Damaged(f"read back after writing: {'; '.join(wrong)}")
        return sums.sums

    def complete() -> int:
        total = {name: one for part in parts for name, one in part.items()}
        files.write_manifest(tmp, total, save.state)
        files.publish(tmp, save.folder)
        return sum(one.size for one in total.values())

    what = f"saving {save.folder}"
    try:
        team.together(what, prepare)
        storage, sums = writer(tmp, save.writes)
        _dcp(
            what,
            lambda: dcp.save(
                {},
                storage_writer=storage,
                planner=PlannedSave(save.writes, save.data),
                process_group=team.group,
                no_dist=team.group is None,
            ),
        )
        parts = team.together(what, read_back)
        return team.first(what, complete)
    except CheckpointError:
        if team.rank == 0:
            files.remove(tmp)
        raise


def _dcp(what: str, fn: Callable[[], object]) -> None:
    """Calls DCP, whose own exception class `except Exception` would not catch."""
    try:
        fn()
    except dcp.api.CheckpointException as error:
        reasons = "; ".join(f"rank {rank}: {wrapped[0]!r}" for rank, wrapped in sorted(error.failures.items()))
        raise CheckpointError(f"{what}: {reasons}") from error
    except Exception as error:
        raise CheckpointError(f"{what}: {error!r}") from error


def _hush_single_process() -> None:
    # DCP warns that it works without process groups, which for us is a decision and no accident. A filter for good
    # and not a context, because contexts of warnings are not safe in the writing thread.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


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
        self._team = _Team(group, rank, world)
        self._keep, self._asynchronous, self._on_event = keep, asynchronous, on_event
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        self._holdings: dict[str, Holding] | None = None
        self._writes: list[Write] = []
        self._buffers = HostBuffers([], pinned=False)
        if group is None:
            _hush_single_process()

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
        save = _Save(folder, self._writes, self._buffers.tensors, kept, problem)
        blocked = time.monotonic() - started
        if self._asynchronous:
            # A daemon: a process that dies of an error does not stay for a write that other ranks cannot finish.
            self._thread = threading.Thread(target=self._run, args=(save, step, blocked), name="checkpoint", daemon=True)
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
        everyone = self._team.together("saving", lambda: holdings)
        self._writes = self._team.together("saving", lambda: assign(everyone))[0][self._team.rank]
        self._buffers = HostBuffers([], pinned=False)  # the old ones go before the new ones come
        self._buffers = HostBuffers(self._writes, pinned=any(h.pinned for h in holdings.values()))
        self._holdings = holdings

    def _run(self, save: _Save, step: int, blocked: float) -> None:
        started = time.monotonic()
        about = {"step": step, "path": str(save.folder)}
        try:
            size = _write(self._team, save)
            seconds = round(time.monotonic() - started, 3)
            self._tell("checkpoint_saved", **about, bytes=size, seconds=seconds, blocked_s=round(blocked, 3))
            if self._team.rank == 0:
                files.retain(self.directory, save.folder, self._keep)
        except BaseException as error:
            self._error = error if isinstance(error, CheckpointError) else CheckpointError(repr(error))
            self._tell("checkpoint_failed", **about, reason=str(self._error))

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
        self, path: Path, tensors: Mapping[str, GlobalTensor], *, prefix: str = "", cast: bool = False
    ) -> dict[str, Any]:
        """Loads a checkpoint's tensors in place and returns its state.

        Args:
            path: a checkpoint that `find_resume` has verified.
            tensors: by global name; a rank passes what it holds.
            prefix: only the checkpoint's tensors of these names count (`model/`: weights only).
            cast: convert to the dtype of `tensors`, instead of refusing another one.

        Raises:
            UserError: a tensor is missing or left over, or has another shape or dtype; nothing has been loaded.
            CheckpointError: reading failed.
        """
        self.wait()
        path, what = Path(path), f"loading {path}"
        metadata = self._team.together(what, ParallelReader(path).read_metadata)[self._team.rank]
        found = _tensors_of(metadata, prefix)
        names = self._team.together(what, lambda: _census(path, tensors, found, cast))
        left_over = sorted(set(found) - {name for mine in names for name in mine})
        if left_over:
            what_now = "is in the checkpoint, this job has no such tensor"
            raise UserError(*_listed(path, [f"{n} {found[n][0]}: {what_now}" for n in left_over]))
        _dcp(what, lambda: _read(path, dict(tensors), self._team.group))
        return self._team.together(what, lambda: files.read_state(path))[self._team.rank]

    def find_resume(self, directory: Path, resume: str | Path) -> Path | None:
        """The verified checkpoint to go on from: every byte of it was read and compared, each rank its share.

        Args:
            directory: where `latest` looks.
            resume: `latest`, or the path of one checkpoint.

        Returns:
            None if `latest` finds no checkpoint at all.

        Raises:
            UserError: the named checkpoint is absent or damaged, or `latest` finds only damaged ones.
        """
        self.wait()
        if str(resume) != "latest":
            path = Path(resume)
            self._team.first("resuming", lambda: _must_exist(path))
            problems = self._verify(path)
            if problems:
                raise UserError(Problem("checkpoint.resume", f"{path} is damaged: {'; '.join(problems)}"))
            return path
        directory = Path(directory)
        found = self._team.first("resuming", lambda: files.clean(directory) or files.checkpoints(directory))
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
                    f"all {len(found)} checkpoints in {directory} are damaged; move them away to start afresh, "
                    "or name a good one",
                )
            )
        return None

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


def _read(path: Path, tensors: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    reader = ParallelReader(path)
    dcp.load(tensors, storage_reader=reader, planner=planner, process_group=group, no_dist=group is None)


def _tensors_of(metadata: Metadata, prefix: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the tensors under a prefix."""
    return {
        name: (tuple(about.size), about.properties.dtype)
        for name, about in metadata.state_dict_metadata.items()
        if isinstance(about, TensorStorageMetadata) and name.startswith(prefix)
    }


def _census(
    path: Path,
    tensors: Mapping[str, GlobalTensor],
    found: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    cast: bool,
) -> list[str]:
    """This rank's names, all of which the checkpoint has with the same shape (and dtype)."""
    problems = []
    for name, tensor in sorted(tensors.items()):
        shape = tuple(tensor.shape)
        if name not in found:
            problems.append(f"{name} {shape}: this job needs it, the checkpoint does not have it")
        elif found[name][0] != shape:
            problems.append(f"{name} has shape {found[name][0]} in the checkpoint, this job needs {shape}")
        elif found[name][1] != tensor.dtype and not cast:
            problems.append(f"{name} is {found[name][1]} in the checkpoint, this job needs {tensor.dtype}")
    if problems:
        raise UserError(*_listed(path, problems))
    return list(tensors)


def _listed(path: Path, problems: list[str]) -> list[Problem]:
    shown = [Problem(str(path), problem) for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        shown.append(Problem(str(path), f"and {len(problems) - _SHOWN} tensors more; is model.* the same?"))
    return shown


def _must_exist(path: Path) -> None:
    if path.is_dir() and not (path / files.MANIFEST).exists() and files.checkpoints(path):
        newest = files.checkpoints(path)[0][1]
        raise UserError(Problem("checkpoint.resume", f"{path} is a folder of checkpoints; name one, such as {newest}"))
    if not path.is_dir():
        near = [str(p) for _, p in files.checkpoints(path.parent)[:3]]
        hint = f"; there are {', '.join(near)}" if near else ""
        raise UserError(Problem("checkpoint.resume", f"{path} does not exist{hint}"))


# One process ----------------------------------------------------------------------------------------------------


def read_full(path: Path, names: Sequence[str] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Whole tensors of a checkpoint by global name (None: all), on the CPU, and its state. For one process.

    Only the files that are read are verified: `names=[]` gives the state at once.

    Raises:
        UserError: the checkpoint is absent or damaged, or a name is not in it.
    """
    path = Path(path)
    _hush_single_process()

    def check(wanted: set[str]) -> None:
        problems = files.differences(path, {name: known[name] for name in wanted})
        if problems:
            raise UserError(Problem(str(path), f"damaged checkpoint: {'; '.join(problems)}"))

    if not path.is_dir():
        raise UserError(Problem(str(path), "there is no such checkpoint"))
    try:
        known = files.read_manifest(path)
    except files.Damaged as error:
        raise UserError(Problem(str(path), f"damaged checkpoint: {error}")) from None
    check({files.METADATA, files.STATE})
    metadata = ParallelReader(path).read_metadata()
    found = _tensors_of(metadata, "")
    wanted = set(found if names is None else names)
    absent = sorted(wanted - set(found))
    if absent:
        raise UserError(*_listed(path, [f"{name}: the checkpoint does not have it" for name in absent]))
    check({where.relative_path for index, where in metadata.storage_data.items() if index.fqn in wanted})
    tensors = {name: torch.empty(found[name][0], dtype=found[name][1]) for name in found if name in wanted}
    if tensors:
        _dcp(f"reading {path}", lambda: _read(path, tensors, None))
    return tensors, files.read_state(path)


def write_full(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Writes whole tensors as a checkpoint that any layout loads. For one process.

    Raises:
        UserError: `path` exists already.
        CheckpointError: writing failed.
    """
    path = Path(path)
    if path.exists():
        raise UserError(Problem(str(path), "exists already; remove it or choose another place for the checkpoint"))
    _hush_single_process()
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    writes = [Write(name, tuple(t.shape), t.dtype, (0,) * t.dim(), tuple(t.shape)) for name, t in whole.items()]
    _write(_ALONE, _Save(path, writes, list(whole.values()), json.loads(json.dumps(dict(state)))))
