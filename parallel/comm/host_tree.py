"""What the hosts of all ranks say to each other beside the step: small objects over gloo, through a tree.

    16,384 ranks      0 … 15   16 … 31   …        each rank in a group with its neighbours,
                      0, 16, … 240   256, …       the first of each in one with the firsts of the next groups, and so on

gloo connects each rank of a group with each other one, so that a group over all ranks has the square of the world in
connections. Here a rank has at most 15 at each of log₁₆(world) levels; up to 16 ranks are one group.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
FAN = 16
"""Ranks of a group: few enough for a full mesh, many enough for few levels."""
Wait = Callable[[Any], None]
"""Returns when a collective of torch's has ended."""
Merge = Callable[[list[T]], T]
"""One answer of those of neighbours, in the order of the ranks; the same however they are put together."""


class Unsaid(RuntimeError):
    """A rank could not say or hear something, and told so; it names the rank."""


@dataclass(frozen=True)
class HostLevel:
    """One group of the tree, seen from one of its ranks.

    Args:
        group: gloo, over `ranks`.
        ranks: ascending; the first one speaks for all on the next level.
        rank: this process.
    """

    group: Any
    ranks: tuple[int, ...]
    rank: int

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for the group."""
        return self.rank == self.ranks[0]

    def collect(self, mine: object, wait: Wait) -> list[Any] | None:
        """Every rank's object, on the first one.

        Raises:
            Unsaid: on all of them; one has no memory for it.
        """
        data, problem = b"", ""
        try:
            data = pickle.dumps(mine)
        except Exception as error:
            problem = failure_line(error)
        sizes = self._agree(len(data), problem, wait)
        own, gathered = torch.zeros(0), list[Tensor]()
        try:
            own = _padded(data, max(sizes))
            if self.leads:
                gathered = list(torch.empty(len(sizes) * max(sizes), dtype=torch.uint8).chunk(len(sizes)))
        except Exception as error:
            problem = failure_line(error)
        self._agree(0, problem, wait)
        # Root is the group's first rank.
        wait(self.group.gather([gathered] if self.leads else [], [own], dist.GatherOptions()))
        found = None
        try:
            if self.leads:
                found = [_loaded(data, size) for data, size in zip(gathered, sizes, strict=True)]
        except Exception as error:
            problem = failure_line(error)
        self._agree(0, problem, wait)
        return found

    def tell(self, mine: object, wait: Wait) -> Any:
        """The first rank's object, on all.

        Raises:
            Unsaid: on all of them; one has no memory for it.
        """
        data, problem = b"", ""
        try:
            data = pickle.dumps(mine) if self.leads else b""
        except Exception as error:
            problem = failure_line(error)
        size = self._agree(len(data), problem, wait)[0]
        told = torch.zeros(0)
        try:
            told = _padded(data, size)
        except Exception as error:
            problem = failure_line(error)
        self._agree(0, problem, wait)
        wait(self.group.broadcast([told], dist.BroadcastOptions()))
        found = None
        try:
            found = mine if self.leads else _loaded(told, size)
        except Exception as error:
            problem = failure_line(error)
        self._agree(0, problem, wait)
        return found

    def numbers(self, number: int, wait: Wait) -> list[int]:
        """Every rank's number, on all."""
        found = [torch.zeros(1, dtype=torch.int64) for _ in self.ranks]
        wait(self.group.allgather([found], [torch.tensor([number])]))
        return [int(n) for n in found]

    def _agree(self, number: int, problem: str, wait: Wait) -> list[int]:
        """Every rank's number, if none has a problem.

        Raises:
            Unsaid: one has.
        """
        found = self.numbers(-1 if problem else number, wait)
        if min(found) < 0:
            ranks = [rank for rank, n in zip(self.ranks, found, strict=True) if n < 0]
            raise Unsaid(f"{named_ranks(ranks)}: {problem or 'out of memory'}")
        return found


@dataclass(frozen=True)
class HostTree:
    """All ranks, each with the groups in which it is.

    Args:
        levels: of this rank, from its neighbours up.
        rank, world: this process among all.
    """

    levels: tuple[HostLevel, ...]
    rank: int
    world: int

    @staticmethod
    def connect(rank: int, world: int, store: dist.Store, timeout: timedelta) -> HostTree:
        """Of all ranks, which call it together.

        Args:
            rank, world: this process among them.
            store: keys for this purpose only.
            timeout: for a collective.
        """
        levels, stride = list[HostLevel](), 1
        while rank % stride == 0 and stride < max(world, 2):
            first = rank - rank % (stride * FAN)
            ranks = tuple(range(first, min(first + stride * FAN, world), stride))
            prefix = dist.PrefixStore(f"{stride}-{first}", store)
            levels.append(HostLevel(make_gloo(prefix, ranks.index(rank), len(ranks), timeout), ranks, rank))
            stride *= FAN
        return HostTree(tuple(levels), rank, world)

    def talk(self, mine: T, merge: Merge[T], wait: Wait, heard: Callable[[T], T] | None = None) -> T:
        """All ranks' objects, merged; small ones.

        Args:
            mine: this rank's.
            merge: makes one of several.
            wait: for collectives.
            heard: what of the end all hear; none: all of it. The first rank has all of it in any case.

        Raises:
            Unsaid: on all ranks; one has no memory for it.
        """
        value, trouble = self._collected(mine, merge, wait)
        told: tuple[T | None, str] = (value if heard is None or self.rank or trouble else heard(value)), trouble
        for level in reversed(self.levels):
            try:
                told = level.tell(told, wait)
            except Unsaid as error:
                told = None, told[1] or str(error)
        if self.world > FAN and not self._least(0 if told[1] else 1, wait):
            told = None, told[1] or "a rank of another group is out of memory"
        if told[1]:
            raise Unsaid(told[1])
        return value if self.rank == 0 else told[0]  # pyright: ignore[reportReturnType]

    def _collected(self, mine: T, merge: Merge[T], wait: Wait) -> tuple[T, str]:
        """On the first rank all objects merged, on another one those for which it speaks, and what went wrong."""
        trouble = ""
        for level in self.levels:
            try:
                found = level.collect((mine, trouble), wait)
                if found is None:
                    break
                trouble = next((each for _, each in found if each), "")
                mine = mine if trouble else merge([value for value, _ in found])
            except Unsaid as error:
                trouble = str(error)
                if not level.leads:
                    break
        return mine, trouble

    def _least(self, number: int, wait: Wait) -> int:
        """The least of all ranks' numbers, on all."""
        for level in self.levels:
            number = min(level.numbers(number, wait))
        for level in reversed(self.levels):
            number = level.numbers(number, wait)[0]
        return number


def wait_blocking(work: Any) -> None:
    """A `Wait` that nobody can end."""
    work.wait()


def make_gloo(store: dist.Store, rank: int, size: int, timeout: timedelta) -> Any:
    """A gloo group that torch keeps no list of: only its own ranks call this, and no other rank hears of it."""
    return dist.ProcessGroupGloo(store, rank, size, timeout)


def joined(lists: list[list[T]]) -> list[T]:
    """Lists one after the other: a `Merge`."""
    return list(chain.from_iterable(lists))


def leftmost(answers: list[T]) -> T:
    """That of the first rank: a `Merge`."""
    return answers[0]


def failure_line(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:1000]


def named_ranks(ranks: Sequence[int], shown: int = 8) -> str:
    """`rank 1, 2`, of many the first ones."""
    more = f" and {len(ranks) - shown} more" if len(ranks) > shown else ""
    return f"rank {', '.join(map(str, ranks[:shown]))}{more}"


def _padded(data: bytes, size: int) -> Tensor:
    # Twice: the transfer makes a copy of its own.
    spare = torch.empty(size, dtype=torch.uint8)
    padded = torch.empty(size, dtype=torch.uint8)
    if data:
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    del spare
    return padded


def _loaded(data: Tensor, size: int) -> Any:
    return pickle.loads(data[:size].numpy().tobytes())
