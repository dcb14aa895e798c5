"""Writing and reading checkpoint folders in torch's distributed checkpoint (DCP) format, together or in one process."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from ..configs.errors import Problem, UserError
from ..parallel.global_tensor import GlobalTensor
from . import checkpoint_files as files
from .checkpoint_plan import ParallelReader, PlannedSave, Write, writer

T = TypeVar("T")
_SHOWN = 8
"""Mistakes of one kind that are listed one by one."""


class CheckpointError(Exception):
    """A save or load failed for a reason other than the user's input (disk full, a rank lost): every rank raises it."""


@dataclass(frozen=True)
class Team:
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
            error = f"{type(failure).__name__}: {failure}"
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
        failures: dict[str, list[str]] = {}
        for rank, (_, failure) in enumerate(answers):
            if failure is not None:
                failures.setdefault(failure, []).append(str(rank))
        if failures:
            reasons = [f"rank {', '.join(ranks[:_SHOWN])}: {failure}" for failure, ranks in failures.items()]
            raise CheckpointError(f"{what}: {'; '.join(reasons)}")
        return [r for r, _ in answers]

    def first(self, what: str, fn: Callable[[], T]) -> T:
        """Rank 0's result of `fn`, which only rank 0 calls."""
        return self.together(what, fn if self.rank == 0 else lambda: None)[0]  # pyright: ignore[reportReturnType]


_ALONE = Team(None, 0, 1)


@dataclass(frozen=True)
class Save:
    """One rank's part of a checkpoint to be written; nothing in it changes any more."""

    folder: Path
    writes: Sequence[Write]
    data: Sequence[Tensor]
    state: Mapping[str, Any]
    problem: Exception | None = None


def write_together(team: Team, save: Save) -> int:
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
            lambda: dcp_save(
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
    except CheckpointException as error:
        reasons = "; ".join(f"rank {rank}: {wrapped[0]!r}" for rank, wrapped in sorted(error.failures.items()))
        raise CheckpointError(f"{what}: {reasons}") from error
    except Exception as error:
        raise CheckpointError(f"{what}: {error!r}") from error


def hush_single_process() -> None:
    # DCP warns that it works without process groups, which for us is a decision and no accident. A filter for good
    # and not a context, because contexts of warnings are not safe in the writing thread.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def read_together(
    team: Team,
    path: Path,
    tensors: Mapping[str, GlobalTensor],
    prefix: str,
    cast: bool,
    left: str | None = None,
) -> dict[str, Any]:
    """Loads in place what `tensors` name; returns the state. Arguments and errors: `Checkpointer.load`."""
    what = f"loading {path}"
    metadata = team.together(what, ParallelReader(path).read_metadata)[team.rank]
    found = tensors_of(metadata, prefix)
    names = team.together(what, lambda: census(path, tensors, found, cast))
    left_over = sorted(set(found) - {name for mine in names for name in mine})
    left_over = [name for name in left_over if left is None or not name.endswith(left)]
    if left_over:
        reason = "is in the checkpoint, this job has no such tensor"
        raise UserError(*listed(path, [f"{name} {found[name][0]} {reason}" for name in left_over]))
    _dcp(what, lambda: _read(path, dict(tensors), team.group))
    return team.together(what, lambda: files.read_state(path))[team.rank]


def _read(path: Path, tensors: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    reader = ParallelReader(path)
    dcp_load(tensors, storage_reader=reader, planner=planner, process_group=group, no_dist=group is None)


def tensors_of(metadata: Metadata, prefix: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the tensors under a prefix."""
    return {
        name: (tuple(about.size), about.properties.dtype)
        for name, about in metadata.state_dict_metadata.items()
        if isinstance(about, TensorStorageMetadata) and name.startswith(prefix)
    }


def census(
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
        raise UserError(*listed(path, problems))
    return list(tensors)


def listed(path: Path, problems: list[str]) -> list[Problem]:
    shown = [Problem(str(path), problem) for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        shown.append(Problem(str(path), f"and {len(problems) - _SHOWN} tensors more; is model.* the same?"))
    return shown


def read_full(path: Path, names: Sequence[str] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Whole tensors of a checkpoint by global name (None: all), on the CPU, and its state. For one process.

    Only the files that are read are verified: `names=[]` gives the state at once.

    Raises:
        UserError: the checkpoint is absent or damaged, or a name is not in it.
    """
    path = Path(path)
    hush_single_process()

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
    found = tensors_of(metadata, "")
    wanted = set(found if names is None else names)
    absent = sorted(wanted - set(found))
    if absent:
        raise UserError(*listed(path, [f"{name}: the checkpoint does not have it" for name in absent]))
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
    hush_single_process()
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    writes = [Write(name, tuple(t.shape), t.dtype, (0,) * t.dim(), tuple(t.shape)) for name, t in whole.items()]
    write_together(_ALONE, Save(path, writes, list(whole.values()), json.loads(json.dumps(dict(state)))))
