"""Checkpoints made of checkpoints: the same one as other ranks would write it, and the mean of several.

Both stream: of any tensor no more than `_CHUNK` elements are in memory at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....configs.errors import Problem, UserError
from ....configs.inert import differences
from ....parallel.global_tensor import GlobalTensor, Placement
from .. import files
from ..index import Contents, write_index
from ..io import listed, not_finite, open_full
from ..manifest import (
    INDEX,
    STATE,
    Damaged,
    FileSum,
    SummedFile,
    damaged_files,
    read_verified,
    write_file,
    write_manifest,
)
from ..names import step_of
from ..same_run import layout_of
from ..saved_model import model_config_from_state
from ..stored import StoredTensor
from ..team import CheckpointError
from ..tensors import DTYPES, TensorFiles, index_of, plan_files
from ..tiers.local import host_words
from ..verification import hosts_of, verification
from ..writers import Write, assign, memory_of
from .layout import layout_config, layout_holdings

_CHUNK = 16 << 20
"""Elements."""
_OF_A_RUN = ("same", "evaluation", "updates", "tokens", "skipped")
"""What a state says of a run that weights alone do not have."""

Reader = Callable[[Write], Tensor]
"""The values of a box, on the CPU."""


def reshard(source: Path, target: Path, layout: str, advance: Callable[[int], object] = bool) -> int:
    """Writes a checkpoint in the files that the ranks of another layout would have written.

    Args:
        source: a checkpoint, which is read and compared first.
        target: a new folder.
        layout: `KEY=VALUE,…`, see `layout_config`.
        advance: told the bytes read since it was told last.

    Returns:
        Bytes written.

    Raises:
        UserError: the source is damaged, the target is there already, or the layout cannot be.
        CheckpointError: writing failed.
    """
    cfg = layout_config(_opened(source).state, layout)
    contents = _verified(source, advance)
    _new(target, contents.state)
    everyone = assign(layout_holdings(cfg, contents))
    with TensorFiles(contents) as stored:
        state = {**contents.state, "layout": layout_of(cfg)}
        return _write(target, everyone, _reader(stored), state, _beside(contents))


def average(
    sources: Sequence[Path],
    target: Path,
    weights: Sequence[float] | None = None,
    *,
    keep_state: bool = False,
    advance: Callable[[int], object] = bool,
) -> int:
    """Writes the mean of checkpoints of one model: parameters and floating buffers are summed in fp64.

    Args:
        sources: checkpoints, which are read and compared first; the last one gives what is not averaged.
        target: a new folder.
        weights: of each; divided by their sum; None: all alike.
        keep_state: keep moments and progress of the last one; else the mean is weights alone, for checkpoint.init.
        advance: told the bytes read since it was told last.

    Returns:
        Bytes written.

    Raises:
        UserError: a source is damaged or of another model, the weights are no weights, or the target is there already.
        CheckpointError: writing failed.
    """
    shares = _shares(len(sources), weights)
    everything = [_verified(source, advance) for source in sources]
    last = everything[-1]
    _new(target, last.state)
    _same_models(everything)
    state = dict(last.state) if keep_state else {k: v for k, v in last.state.items() if k not in _OF_A_RUN}
    state["average"] = {"sources": [str(source) for source in sources], "weights": shares}
    names = [name for name in last.tensors if keep_state or name.startswith("model/")]
    writes = [
        Write(name, last.tensors[name].shape, DTYPES[last.tensors[name].dtype], box.offsets, box.sizes)
        for name in names
        for box in last.tensors[name].boxes
    ]
    with ExitStack() as opened:
        readers = [_reader(opened.enter_context(TensorFiles(contents))) for contents in everything]

        def mean(part: Write) -> Tensor:
            if not part.name.startswith("model/") or not part.dtype.is_floating_point:
                return readers[-1](part)
            total = torch.zeros(part.sizes, dtype=torch.float64)
            for share, read in zip(shares, readers, strict=True):
                total.add_(read(part).double(), alpha=share)
            return total.to(part.dtype)

        return _write(target, [writes], mean, state, _beside(last))


def _shares(count: int, weights: Sequence[float] | None) -> list[float]:
    given = [1.0] * count if weights is None else list(weights)
    if len(given) != count:
        raise UserError(Problem("--weights", f"{len(given)} weights for {count} checkpoints; give one for each"))
    total = math.fsum(given)
    if any(not math.isfinite(weight) or weight < 0 for weight in given) or not 0 < total < math.inf:
        raise UserError(Problem("--weights", f"{given} must be numbers from 0 on, of which one is above 0"))
    return [weight / total for weight in given]


def _opened(path: Path) -> Contents:
    """What a checkpoint's small files say, if it is no part of one."""
    contents = open_full(path)
    hosts = hosts_of(contents.state)
    if hosts:
        nodes = f"is the part of one of {len(hosts)} nodes ({host_words(hosts)})"
        raise UserError(Problem(str(path), f"{nodes}; name a checkpoint that all ranks see"))
    return contents


def _verified(path: Path, advance: Callable[[int], object]) -> Contents:
    found = verification(path, advance)
    if found.problems:
        raise UserError(Problem(str(path), f"is damaged: {'; '.join(found.problems)}"))
    return _opened(path)


def _new(target: Path, state: Mapping[str, Any]) -> None:
    if target.exists():
        raise UserError(Problem(str(target), "exists already; remove it or choose another place for the checkpoint"))
    step = state.get("step", 0)
    if step_of(target.name) not in (None, step):
        raise UserError(Problem(str(target), f"is the name of another step's checkpoint than {step}; choose another"))


def _same_models(everything: Sequence[Contents]) -> None:
    """Raises UserError where parameters are not of one model: by its keys, or, where none differs, by the tensors."""
    last = everything[-1]
    model = model_config_from_state(last.state)
    problems: list[Problem] = []
    for other in everything[:-1]:
        for key, (mine, theirs) in differences(model, model_config_from_state(other.state)).items():
            problems.append(Problem(f"model.{key}", f"{theirs} in {other.path}, {mine} in {last.path}"))
    if problems:
        raise UserError(*problems)
    for other in everything[:-1]:
        wrong = [
            f"{name} is {_words(other.tensors.get(name))}, in {last.path} {_words(last.tensors.get(name))}"
            for name in sorted({*other.tensors, *last.tensors})
            if name.startswith("model/") and _words(other.tensors.get(name)) != _words(last.tensors.get(name))
        ]
        if wrong:
            raise UserError(*listed(other.path, wrong))


def _words(stored: StoredTensor | None) -> str:
    return "absent" if stored is None else f"{stored.shape} {stored.dtype}"


def _reader(stored: TensorFiles) -> Reader:
    """Reads a box, wherever its elements lie."""

    def read(part: Write) -> Tensor:
        dtype = DTYPES[stored.contents.tensors[part.name].dtype]
        out = torch.empty(part.sizes, dtype=dtype)
        place = Placement(part.shape, part.offsets, part.sizes)
        stored.read({part.name: GlobalTensor(place, 0, out.numel(), out.view(-1))})
        return out

    return read


def _beside(contents: Contents) -> dict[str, bytes]:
    """The small files beside a checkpoint's tensors."""
    taken = {INDEX, STATE, ".metadata"} | {box.file for about in contents.tensors.values() for box in about.boxes}
    names = [name for name in contents.files if name not in taken]
    return {name: read_verified(contents.path, name, contents.files[name], 1 << 30) for name in names}


def _write(
    target: Path,
    everyone: Sequence[Sequence[Write]],
    read: Reader,
    state: Mapping[str, Any],
    beside: Mapping[str, bytes],
) -> int:
    """Writes, reads back, and publishes."""
    tmp, bad = files.temporary(target), set[str]()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        files.remove(tmp)
        tmp.mkdir()
        sums: dict[str, FileSum] = {}
        for rank, writes in enumerate(everyone):
            for planned in plan_files(rank, writes):
                with SummedFile(tmp / planned.name) as out:
                    out.write(planned.header)
                    for member in planned.members:
                        for part in _parts(writes[member]):
                            values = read(part)
                            bad.update(not_finite([part], [values]))
                            out.write(memory_of(values))
                    sums[planned.name] = out.finish()
        sums[INDEX] = write_file(tmp / INDEX, write_index(index_of(everyone)))
        sums |= {name: write_file(tmp / name, content) for name, content in beside.items()}
        wrong = damaged_files(tmp, sums)
        if wrong:
            raise Damaged(f"read back after writing: {'; '.join(wrong.values())}")
        write_manifest(tmp, sums, state, sorted(bad)[:8])
        files.publish_folder(tmp, target)
    except (OSError, Damaged) as error:
        with suppress(OSError):
            files.remove(tmp)
        raise CheckpointError(f"writing {target}: {error}") from error
    return sum(one.size for one in sums.values())


def _parts(write: Write) -> Iterator[Write]:
    """A box in row-major order, in parts of at most `_CHUNK` elements where its first dimensions allow it."""
    dim = next((d for d, size in enumerate(write.sizes) if size > 1), None)
    if dim is None or math.prod(write.sizes) <= _CHUNK:
        yield write
        return
    inner = math.prod(write.sizes[dim + 1 :])
    rows = max(1, _CHUNK // inner)
    for at in range(0, write.sizes[dim], rows):
        offsets, sizes = list(write.offsets), list(write.sizes)
        offsets[dim] += at
        sizes[dim] = min(rows, write.sizes[dim] - at)
        yield from _parts(Write(write.name, write.shape, write.dtype, tuple(offsets), tuple(sizes)))
