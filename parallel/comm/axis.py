"""An axis: one direction of the mesh, seen from one rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

import torch.distributed as dist

from ..record.ring import Recorder
from .shared_memory import LocalAxis
from .waiting import Abort, Waiter


class Communicator:
    """One of torch's groups while its mesh stands; nothing else keeps it, and it ends with its last reference."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group: dist.ProcessGroup | None = group

    @property
    def group(self) -> dist.ProcessGroup:
        """torch's.

        Raises:
            RuntimeError: the mesh was closed. (torch would take its default group for None.)
        """
        if self._group is None:
            raise RuntimeError("the mesh of this communicator was closed")
        return self._group

    def cut(self) -> None:
        """Gives the communicator up."""
        self._group = None


@dataclass(frozen=True)
class Axis:
    """One direction of the mesh, seen from one rank. Axes of size 1 have no group and communicate nothing."""

    name: str
    rank: int
    size: int
    ranks: tuple[int, ...]
    link: Communicator | None = field(repr=False, default=None)
    recorder: Recorder | None = field(repr=False, default=None)
    abort: Abort | None = field(repr=False, default=None)
    code: int = 0
    """The axis's name in the record."""
    sequences: dict[tuple[str, int], Iterator[int]] = field(repr=False, default_factory=dict, compare=False)
    """Numbers this rank's collectives over the axis, and its sends to and receives from each peer."""
    local: LocalAxis | None = field(repr=False, default=None, compare=False)
    """Where its ranks can read each other's memory."""
    waiters: dict[tuple[str, int], Waiter] = field(repr=False, default_factory=dict, compare=False)
    """What watches this rank's sends to, and receives from, each peer (gloo)."""

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Of several ranks."""
        return self.link.group if self.link is not None else None

    def number(self, kind: str, peer: int = -1) -> int:
        """How many collectives there were before this one; of a transfer, how many of its kind with this peer."""
        key = ("", -1) if peer < 0 else (kind, peer)
        return next(self.sequences.setdefault(key, count()))

    @staticmethod
    def single(name: str) -> Axis:
        """An axis of one rank: what single-device code uses."""
        return Axis(name, 0, 1, (0,))
