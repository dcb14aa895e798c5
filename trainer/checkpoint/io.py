"""Writing and reading checkpoint folders, together or in one process."""

from __future__ import annotations

import json
import secrets
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...configs.errors import Problem, UserError
from ...parallel.comm.host_tree import leftmost
from ...parallel.global_tensor import GlobalTensor
from . import files
from .index import Contents, read_contents, write_index
from .manifest import INDEX, Damaged, FileSum, damaged_files, write_file, write_manifest
from .names import step_of
from .stored import StoredTensor
from .team import CheckpointError, Team
from .tensors import DTYPES, PlannedFile, TensorFiles, index_of, plan_files, write_files
from .tiers.local import NodeFolders, make_own
from .writers import Write

_SHOWN = 8
"""Mistakes of one kind that are listed one by one."""
_FINITE_AT_ONCE = 16 << 20
"""Elements that are looked at together for NaN: the answer takes a byte for each."""

_ALONE = Team(None, 0, 1)


@dataclass(frozen=True)
class Save:
    """One rank's part of a checkpoint to be written; nothing in it changes any more."""

    folder: Path
    writes: Sequence[Write]
    data: Sequence[Tensor]
    files: Sequence[PlannedFile]
    index: Mapping[str, StoredTensor]
    """Of all ranks that see the folder; only the one that looks after it needs it."""
    state: Mapping[str, Any]
    problem: Exception | None = None
    nodes: NodeFolders | None = None
    """Where each node writes a part into a folder of its own."""
    beside: Mapping[str, bytes] = field(default_factory=dict)
    """Small files that belong to the checkpoint, by name; those of the rank that looks after the folder are written."""


@dataclass(frozen=True)
class Published:
    """A checkpoint that was written.

    Args:
        size: in bytes.
        not_finite: tensors with values with which no run can go on.
    """

    size: int
    not_finite: tuple[str, ...]


def write_together(team: Team, save: Save) -> Published:
    """Writes and publishes a checkpoint together.

    Raises:
        CheckpointError: on every rank; what was there before is untouched.
    """
    tmp = files.temporary(save.folder)

    def prepare() -> str:
        if save.problem is not None:
            raise save.problem
        if team.leads:
            if save.nodes is not None:
                make_own(save.folder.parent)
            save.folder.parent.mkdir(parents=True, exist_ok=True)
            files.remove(tmp)
            tmp.mkdir()
        return secrets.token_hex(8) if save.nodes is not None else ""

    def write() -> tuple[dict[str, FileSum], list[str]]:
        sums = write_files(tmp, save.files, save.data)
        if team.leads:
            sums[INDEX] = write_file(tmp / INDEX, write_index(save.index))
            sums |= {name: write_file(tmp / name, content) for name, content in save.beside.items()}
        wrong = damaged_files(tmp, sums)
        if wrong:
            raise Damaged(f"read back after writing: {'; '.join(wrong.values())}")
        return sums, not_finite(save.writes, save.data)

    def complete() -> Published:
        total = {name: one for rank in team.sharing for name, one in parts[rank][0].items()}
        bad = tuple(sorted({name for _, names in parts for name in names}))
        mark = save.nodes.mark(number) if save.nodes is not None else {}
        write_manifest(tmp, total, {**save.state, **mark}, not_finite=bad[:_SHOWN])
        files.publish_folder(tmp, save.folder)
        return Published(sum(one.size for sums, _ in parts for one in sums.values()), bad)

    what = f"saving {save.folder}"
    try:
        number = team.agree(what, prepare, leftmost)
        parts = team.to_leader(what, write)
        return team.first(what, complete)
    except CheckpointError:
        if team.leads:
            with suppress(OSError):  # a storage that takes nothing may also give nothing back; `clean` tries again
                files.remove(tmp)
        raise


def not_finite(writes: Sequence[Write], data: Sequence[Tensor]) -> list[str]:
    """The tensors with values with which no run can go on: a NaN anywhere, or an infinite parameter.

    An infinite state only lets its parameter stand still.
    """
    found: list[str] = []
    for write, tensor in zip(writes, data, strict=True):
        if not write.dtype.is_floating_point or write.dtype.itemsize == 1:
            continue
        parts = tensor.reshape(-1).split(_FINITE_AT_ONCE)
        if write.name.startswith("model/"):
            good = all(bool(torch.isfinite(part).all()) for part in parts)
        else:
            good = not any(bool(torch.isnan(part).any()) for part in parts)
        if not good:
            found.append(write.name)
    return found


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
    # Each rank reads the index itself: sending it around would cost as much.
    contents = contents_together(team, what, path)
    found = tensors_of(contents, prefix)
    with TensorFiles(contents) as stored:

        def plan() -> set[str]:
            names = census(path, tensors, found, cast)
            with refusing(path):
                for name, piece in tensors.items():
                    for box in piece.boxes:
                        stored.parts(name, box.offsets, box.sizes)
            return set(names)

        known = team.agree(what, plan, lambda names: set[str]().union(*names))
        left_over = [n for n in sorted(set(found) - known) if left is None or not n.endswith(left)]

        def read() -> None:
            if left_over:  # of nodes' own parts each rank sees another one
                reason = "is in the checkpoint, this job has no such tensor"
                raise UserError(*listed(path, [f"{name} {found[name][0]} {reason}" for name in left_over]))
            with refusing(path):
                stored.read(tensors)

        team.each(what, read)
    return contents.state


def lacking(path: Path, tensors: Mapping[str, GlobalTensor]) -> list[str]:
    """Why a rank cannot read its pieces from a part of a checkpoint; empty: it can."""
    reason = ""
    try:
        contents = read_contents(path)
        census(path, tensors, tensors_of(contents, ""), cast=False)
        with TensorFiles(contents) as stored:
            for name, piece in tensors.items():
                for box in piece.boxes:
                    stored.parts(name, box.offsets, box.sizes)
    except UserError as error:
        reason = error.problems[0].message
    except Damaged as error:
        reason = str(error)
    return [f"it is not what this layout needs here: {reason}"] if reason else []


def contents_together(team: Team, what: str, path: Path) -> Contents:
    """The contents of a checkpoint, read by every rank.

    Raises:
        UserError: it is damaged.
    """
    kept: list[Contents] = []

    def read() -> None:
        with refusing(path):
            kept.append(read_contents(path))

    team.each(what, read)
    return kept[0]


@contextmanager
def refusing(path: Path) -> Generator[None, None, None]:
    """Says that the checkpoint is damaged.

    Raises:
        UserError: in the place of `Damaged`.
    """
    try:
        yield
    except Damaged as error:
        raise UserError(Problem(str(path), f"damaged checkpoint: {error}")) from None


def tensors_of(contents: Contents, prefix: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the tensors under a prefix."""
    return {
        name: (about.shape, DTYPES[about.dtype]) for name, about in contents.tensors.items() if name.startswith(prefix)
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


def open_full(path: Path) -> Contents:
    """What a checkpoint holds. For one process; of the files only the small ones are read, and compared.

    Raises:
        UserError: the checkpoint is absent or damaged.
    """
    if not path.is_dir():
        raise UserError(Problem(str(path), "there is no such checkpoint"))
    with refusing(path):
        return read_contents(path)


def read_full(path: Path, names: Sequence[str] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Whole tensors of a checkpoint by global name (None: all), on the CPU, and its state. For one process.

    Only the files that are read are verified: `names=[]` gives the state at once.

    Raises:
        UserError: the checkpoint is absent or damaged, or a name is not in it.
    """
    path = Path(path)
    contents = open_full(path)
    wanted = set(contents.tensors if names is None else names)
    absent = sorted(wanted - set(contents.tensors))
    if absent:
        raise UserError(*listed(path, [f"{name}: the checkpoint does not have it" for name in absent]))
    read_from = {box.file for name in wanted for box in contents.tensors[name].boxes}
    problems = damaged_files(path, {name: contents.files[name] for name in read_from})
    if problems:
        raise UserError(Problem(str(path), f"damaged checkpoint: {'; '.join(problems.values())}"))
    found = {name: about for name, about in contents.tensors.items() if name in wanted}
    with refusing(path), TensorFiles(contents) as stored:
        for name, about in found.items():  # before memory is taken for shapes that nothing fills
            stored.parts(name, (0,) * len(about.shape), about.shape)
        tensors = {name: torch.empty(about.shape, dtype=DTYPES[about.dtype]) for name, about in found.items()}
        stored.read({name: GlobalTensor.of(tensor) for name, tensor in tensors.items()})
    return tensors, contents.state


def write_full(
    path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], beside: Mapping[str, bytes] | None = None
) -> None:
    """Writes whole tensors as a checkpoint that any layout loads. For one process.

    Args:
        path: a new folder.
        tensors: by global name.
        state: JSON values.
        beside: small files that belong to it, by name.

    Raises:
        UserError: `path` exists already, or is named as the checkpoint of another step.
        CheckpointError: writing failed.
    """
    path, step = Path(path), int(state.get("step", 0))
    if path.exists():
        raise UserError(Problem(str(path), "exists already; remove it or choose another place for the checkpoint"))
    if step_of(path.name) not in (None, step):
        raise UserError(Problem(str(path), f"is the name of another step's checkpoint than {step}; choose another one"))
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    writes = [Write(name, tuple(t.shape), t.dtype, (0,) * t.dim(), tuple(t.shape)) for name, t in whole.items()]
    kept = json.loads(json.dumps(dict(state), allow_nan=False))
    planned, index = plan_files(0, writes), index_of([writes])
    save = Save(path, writes, list(whole.values()), planned, index, kept, beside=beside or {})
    write_together(_ALONE, save)
