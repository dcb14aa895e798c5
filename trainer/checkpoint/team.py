"""The ranks that save and load together: what one cannot do, all hear of and none waits for."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ...configs.errors import UserError
from ...parallel.comm.waiting import Abort, Aborted

T = TypeVar("T")
_SHOWN = 8
"""Ranks with the same failure that are listed one by one."""
_POLL_S = 0.001


class CheckpointError(Exception):
    """A save or load failed for a reason other than the user's input (disk full, a rank lost): every rank raises it."""


@dataclass(frozen=True)
class Team:
    """The ranks that save and load together.

    Args:
        group: gloo, over all of them; None for one.
        rank, world: this process in the group.
        abort: ends every wait for the others, and says how long one may take; None: as long as the group lets it.
        hosts: where each rank is, if each host has a folder of its own; empty: all ranks see one folder.
    """

    group: dist.ProcessGroup | None
    rank: int
    world: int
    abort: Abort | None = None
    meets: Callable[[bool], object] = bool
    """Told when this rank has its part ready and waits for the others, and when it goes on."""
    hosts: tuple[str, ...] = ()

    @cached_property
    def sharing(self) -> tuple[int, ...]:
        """The ranks that see this one's folder, itself among them; the first of them looks after it."""
        if not self.hosts:
            return tuple(range(self.world))
        return tuple(rank for rank, host in enumerate(self.hosts) if host == self.hosts[self.rank])

    @cached_property
    def leaders(self) -> tuple[int, ...]:
        """The ranks that look after a folder."""
        return tuple(sorted({host: rank for rank, host in reversed([*enumerate(self.hosts)])}.values())) or (0,)

    @property
    def leads(self) -> bool:
        """Whether this rank looks after its folder."""
        return self.rank == self.sharing[0]

    @property
    def apart(self) -> bool:
        """Whether there are several folders, each of which holds a part."""
        return len(self.sharing) < self.world

    def together(self, what: str, fn: Callable[[], T]) -> list[T]:
        """Every rank's result of `fn`, on every rank, or on every rank the error of any.

        Raises:
            UserError: one was raised.
            Aborted: the wait for the others was ended.
            CheckpointError: anything else was raised, or a rank is lost.
        """
        result, error = None, None
        try:
            result = fn()
        except UserError as mistake:
            error = mistake
        except Exception as failure:
            error = _line(failure)
        answers: list[Any] = [(result, error)]
        if self.group is not None:
            try:
                self.meets(True)
                answers = self._exchange(self.group, (result, error))
                self.meets(False)
            except CheckpointError as failure:
                raise CheckpointError(f"{what}: {failure}") from failure.__cause__
            except Aborted:
                raise
            except Exception as lost:
                raise CheckpointError(f"{what}: a rank is lost ({error or _line(lost)})") from lost
        mistakes = list(dict.fromkeys(p for _, e in answers if isinstance(e, UserError) for p in e.problems))
        if mistakes:
            raise UserError(*mistakes)
        failures: dict[str, list[str]] = {}
        for rank, (_, failure) in enumerate(answers):
            if failure is not None:
                failures.setdefault(failure, []).append(str(rank))
        if failures:
            reasons = [f"{_ranks(ranks, self.world)}{failure}" for failure, ranks in failures.items()]
            raise CheckpointError(f"{what}: {'; '.join(reasons)}")
        return [r for r, _ in answers]

    def first(self, what: str, fn: Callable[[], T]) -> T:
        """The result of `fn` of the rank that looks after this rank's folder; only such ranks call it."""
        found = self.together(what, fn if self.leads else lambda: None)
        return found[self.sharing[0]]  # pyright: ignore[reportReturnType]

    def _exchange(self, group: dist.ProcessGroup, answer: Any) -> list[Any]:
        """Every rank's answer. A rank that has no memory for it tells the others, which would wait for it otherwise."""
        mine, problem = b"", ""
        try:
            mine = pickle.dumps(answer)
        except Exception as error:
            problem = _line(error)
        sizes = self._agree(group, len(mine), problem)
        gathered: list[Tensor] = []
        own: list[Tensor] = []
        try:
            # Twice: the transfer makes a copy of its own.
            spare = torch.empty(self.world * max(sizes), dtype=torch.uint8)
            gathered = list(torch.empty(self.world * max(sizes), dtype=torch.uint8).chunk(self.world))
            own.append(torch.zeros(max(sizes), dtype=torch.uint8))
            own[0][: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
            del spare
        except Exception as error:
            problem = _line(error)
        self._agree(group, 0, problem)
        self._wait(dist.all_gather(gathered, own[0], group=group, async_op=True))
        answers: list[Any] = []
        try:
            answers = [pickle.loads(g[:size].numpy().tobytes()) for g, size in zip(gathered, sizes, strict=True)]
        except Exception as error:
            problem = _line(error)
        self._agree(group, 0, problem)
        return answers

    def _agree(self, group: dist.ProcessGroup, number: int, problem: str) -> list[int]:
        """Every rank's number, if none has a problem.

        Raises:
            CheckpointError: one has.
        """
        numbers = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        self._wait(dist.all_gather(numbers, torch.tensor([-1 if problem else number]), group=group, async_op=True))
        found = [int(n) for n in numbers]
        if min(found) < 0:
            ranks = [str(rank) for rank, n in enumerate(found) if n < 0]
            raise CheckpointError(f"{_ranks(ranks, self.world)}{problem or 'out of memory'}")
        return found

    def _wait(self, work: Any) -> None:
        """Waits for a collective, as long as nobody ends the wait."""
        if self.abort is not None:
            self.abort.until("the other ranks", work.is_completed, _POLL_S)
        work.wait()


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:1000]


def _ranks(ranks: list[str], world: int) -> str:
    if world == 1:
        return ""
    more = f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else ""
    return f"rank {', '.join(ranks[:_SHOWN])}{more}: "
