"""The words of a sharding plan: which parameter is cut how, and which gradients are partial sums.

A model family states its plan as a list of `(pattern, rule)`; `models/parallelize.py` applies it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .comm.mesh import Axis
from .global_tensor import Placement


@dataclass(frozen=True)
class ColumnWise:
    """Output features cut over tp. `heads`: key-value heads may be fewer than ranks and are then replicated."""

    kv: bool = False


@dataclass(frozen=True)
class RowWise:
    """Input features cut over tp; the bias is whole."""


@dataclass(frozen=True)
class Vocab:
    """Rows of the vocabulary cut over tp, or over tp × pp."""


@dataclass(frozen=True)
class Whole:
    """Replicated over tp; each rank's gradient covers its own tokens or heads only, so gradients are summed."""


@dataclass(frozen=True)
class Expert:
    """Experts cut over ep along dim 0, and their inner width, dim `inner`, over etp; none: whole in every rank of etp,
    whose gradients are parts of a sum."""

    inner: int | None = None


Rule = ColumnWise | RowWise | Vocab | Whole | Expert
Plan = tuple[tuple[str, Rule], ...]
Partial = Literal["", "tp", "tp_replica", "ends", "etp"]
"""The axis over which a parameter's gradient is a partial sum."""
ReplicaFamily = Literal["dense", "expert"]
"""Whose replicas a parameter has: those of the data axis, or those of the expert data axis (edp)."""


@dataclass(frozen=True)
class Sharding:
    """Where one parameter lives: its slice of the global tensor, and over which axis its gradient is partial."""

    placement: Placement
    partial: Partial = ""
    family: ReplicaFamily = "dense"


@dataclass(frozen=True)
class Axes:
    """What the rules cut over."""

    tp: Axis
    shards: Axis
    """Groups of tp ranks with different key-value heads."""
    replicas: Axis
    """The tp ranks of one such group."""
    vocab: Axis
    """tp, or all tensor and pipeline ranks where the vocabulary is balanced."""
    ep: Axis
    etp: Axis


def place_parameter(rule: Rule, name: str, shape: tuple[int, ...], axes: Axes) -> Sharding:
    """The slice of the global parameter `name` that this rank holds."""
    tp, shards, replicas, vocab = axes.tp, axes.shards, axes.replicas, axes.vocab
    bias = name.endswith("bias")
    match rule:
        case ColumnWise(kv=True) if replicas.size > 1:
            return Sharding(Placement.shard(shape, 0, shards.rank, shards.size), "tp_replica")
        case ColumnWise():
            return Sharding(Placement.shard(shape, 0, tp.rank, tp.size))
        case Expert(inner=inner):
            mine = Placement.shard(shape, 0, axes.ep.rank, axes.ep.size)
            if inner is not None:
                return Sharding(mine.cut(inner, axes.etp.rank, axes.etp.size), family="expert")
            return Sharding(mine, "etp" if axes.etp.size > 1 else "", "expert")
        case Vocab():
            return Sharding(Placement.shard(shape, 0, vocab.rank, vocab.size))
        case RowWise() if not bias:
            return Sharding(Placement.shard(shape, 1, tp.rank, tp.size))
        case _:
            return Sharding(Placement.whole(shape), "tp" if tp.size > 1 else "")
