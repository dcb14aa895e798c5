"""A few global tensors and the pieces that ranks of different layouts hold of them."""

from __future__ import annotations

import errno
import math
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pentad.parallel.global_tensor import GlobalTensor, Placement
from pentad.trainer.checkpoint.checkpointer import Checkpointer
from pentad.trainer.checkpoint.manifest import SummedFile
from pentad.trainer.checkpoint.retention import Retention
from pentad.trainer.checkpoint.tiers.local import NodeFolders
from tests.distributed import host_tree

# name: shape, dimension cut over tp (None: replicated), number of slices where fewer than tp
SHAPES: dict[str, tuple[tuple[int, ...], int | None, int | None]] = {
    "embed": ((12, 6), 0, None),
    "up": ((8, 9), 0, None),
    "down": ((5, 8), 1, None),
    "kv": ((6, 7), 0, 2),
    "norm": ((7,), None, None),
    "conv": ((4, 3, 5), 1, 1),
    "scale": ((), None, None),
}
KINDS = ("model", "optim/exp_avg", "optim/exp_avg_sq")


def global_values(seed: int = 0) -> dict[str, Tensor]:
    """The global tensors, with other values for another seed."""
    draw = torch.Generator().manual_seed(seed)
    return {
        f"{kind}/{name}": torch.randn(shape, generator=draw) for kind in KINDS for name, (shape, *_) in SHAPES.items()
    }


def _placement(name: str, tp: int, tp_rank: int) -> Placement:
    shape, dim, slices = SHAPES[name]
    if dim is None or tp == 1:
        return Placement.whole(shape)
    count = min(tp, slices or tp)
    return Placement.shard(shape, dim, tp_rank * count // tp, count)


def _zero1(sizes: dict[str, int], dp: int, dp_rank: int) -> dict[str, tuple[int, int]]:
    """Equal shares of one flat bucket, which cut parameters anywhere."""
    share = math.ceil(sum(sizes.values()) / dp)
    low, high, at, runs = dp_rank * share, (dp_rank + 1) * share, 0, {}
    for name, size in sizes.items():
        start, stop = max(low - at, 0), min(high - at, size)
        if start < stop:
            runs[name] = (start, stop)
        at += size
    return runs


def pieces(layout: str, tp: int, rank: int, world: int, values: dict[str, Tensor] | None) -> dict[str, GlobalTensor]:
    """A rank's pieces, with the values of `values`, or NaN.

    `layout`: `zero1`, `ddp`, `fsdp` (rows, uneven, some ranks empty) or `mixed` (replicas cut differently).
    """
    tp_rank, dp_rank, dp = rank % tp, rank // tp, world // tp
    where = {name: _placement(name, tp, tp_rank) for name in SHAPES}
    sizes = {name: math.prod(p.local_shape) for name, p in where.items()}
    if layout == "zero1":
        runs = _zero1(sizes, dp, dp_rank)
    elif layout == "fsdp":
        runs = {}
        for name, place in where.items():
            rows = place.local_shape[0] if place.local_shape else 1
            each, width = math.ceil(rows / dp), sizes[name] // rows
            runs[name] = (min(dp_rank * each, rows) * width, min((dp_rank + 1) * each, rows) * width)
    elif layout == "mixed" and dp_rank % 2:
        runs = {name: (size // 3, size) for name, size in sizes.items()}
    else:
        runs = {name: (0, size) for name, size in sizes.items()}
    return {
        f"{kind}/{name}": _piece(where[name], run, values[f"{kind}/{name}"] if values else None)
        for kind in KINDS
        for name, run in runs.items()
    }


def _piece(place: Placement, run: tuple[int, int], value: Tensor | None) -> GlobalTensor:
    # Inside a larger bucket, as in training: the data must not be taken for the whole storage.
    bucket = torch.full((run[1] - run[0] + 5,), math.nan)
    data = bucket[2 : 2 + run[1] - run[0]]
    if value is not None:
        local = place.of(value)
        data.copy_(local.reshape(-1)[run[0] : run[1]])
    return GlobalTensor(place, *run, data)


def same(one: dict[str, GlobalTensor], other: dict[str, GlobalTensor]) -> bool:
    """Whether two ranks' pieces are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[n].local, other[n].local) for n in one)


def checkpointer(
    directory: Path,
    *,
    keep: int | Retention = 0,
    asynchronous: bool = False,
    on_event: Callable[[dict[str, Any]], None] = lambda _: None,
    nodes: NodeFolders | None = None,
) -> Checkpointer:
    """A checkpointer over the default process group, or for one process."""
    team = dist.is_initialized()
    return Checkpointer(
        directory,
        group=host_tree() if team else None,
        rank=dist.get_rank() if team else 0,
        world=dist.get_world_size() if team else 1,
        keep=keep if isinstance(keep, Retention) else Retention(keep),
        asynchronous=asynchronous,
        on_event=on_event,
        nodes=nodes,
    )


def killed_before_change(number: int) -> None:
    """From now on this process is killed before its `number`th change of the disk, from 1: at every write, rename and
    sync of a save, and whatever else it does with files."""
    _before_change(number, lambda: os.kill(os.getpid(), signal.SIGKILL), setattr, also=("unlink", "rmdir"))


def full_at_change(number: int, patch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """The disk takes nothing at this process's `number`th change, from 1; removing is no such change.

    Returns:
        Whether it has come to that.
    """
    met: list[int] = []

    def full() -> None:
        if not met:
            met.append(number)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    _before_change(number, full, patch.setattr)
    return lambda: bool(met)


def _before_change(
    number: int, strike: Callable[[], object], set_: Callable[[Any, str, Any], object], also: Sequence[str] = ()
) -> None:
    left = number

    def counted(fn: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left <= 0:
                strike()
            return fn(*args, **kwargs)

        return call

    for name in ("fsync", "rename", "mkdir", *also):
        set_(os, name, counted(getattr(os, name)))
    set_(SummedFile, "write", counted(SummedFile.write))
