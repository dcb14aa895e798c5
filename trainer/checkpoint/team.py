"""The ranks that save and load together: what one cannot do, all hear of and none waits for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial, wraps
from typing import Any, Generic, TypeVar

from ...configs.errors import Problem, UserError
from ...parallel.comm.host_tree import HostTree, Merge, Unsaid, failure_line, joined, leftmost, named_ranks
from ...parallel.comm.waiting import Abort, Aborted

T = TypeVar("T")
_POLL_S = 0.001


class CheckpointError(Exception):
    """A save or load failed for a reason other than the user's input (disk full, a rank lost): every rank raises it."""


@dataclass(frozen=True)
class Answer(Generic[T]):
    """What one rank has to say, or several together.

    Args:
        result: none, where there is something wrong.
        mistakes: of the user's.
        failures: ranks by what they failed of.
    """

    result: T | None
    mistakes: tuple[Problem, ...] = ()
    failures: dict[str, list[int]] = field(default_factory=dict)

    @staticmethod
    def of(rank: int, fn: Callable[[], T]) -> Answer[T]:
        """What comes of `fn` on one rank."""
        try:
            return Answer(fn())
        except UserError as mistake:
            return Answer(None, tuple(mistake.problems))
        except Exception as failure:
            return Answer(None, (), {failure_line(failure): [rank]})

    @staticmethod
    def merged(merge: Merge[T], answers: list[Answer[T]]) -> Answer[T]:
        """Of several ranks."""
        mistakes = tuple(dict.fromkeys(problem for each in answers for problem in each.mistakes))
        failures: dict[str, list[int]] = {}
        for each in answers:
            for why, ranks in each.failures.items():
                failures.setdefault(why, []).extend(ranks)
        if mistakes or failures:
            return Answer(None, mistakes, failures)
        return Answer(merge([each.result for each in answers]))  # pyright: ignore[reportArgumentType]

    def without_result(self) -> Answer[T]:
        """Only what is wrong."""
        return Answer(None, self.mistakes, self.failures)


@dataclass(frozen=True)
class Team:
    """The ranks that save and load together.

    Args:
        group: of all of them; None for one.
        rank, world: this process in the group.
        abort: ends every wait for the others, and says how long one may take; None: as long as the group lets it.
        hosts: where each rank is, if each host has a folder of its own; empty: all ranks see one folder.
    """

    group: HostTree | None
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
        """Every rank's result of `fn`, on every rank: bytes that grow with the world. Errors as of `agree`."""
        return self.agree(what, _listed(fn), joined)

    def agree(self, what: str, fn: Callable[[], T], merge: Merge[T]) -> T:
        """All ranks' results of `fn`, merged, on every rank, or on every rank the error of any.

        Raises:
            UserError: one was raised.
            Aborted: the wait for the others was ended.
            CheckpointError: anything else was raised, or a rank is lost.
        """
        return self._talk(what, fn, merge).result  # pyright: ignore[reportReturnType]

    def each(self, what: str, fn: Callable[[], object]) -> None:
        """Calls `fn` on all ranks; returns when it has on all. Errors as of `agree`."""
        self.agree(what, lambda: bool(fn()), all)

    def to_leader(self, what: str, fn: Callable[[], T]) -> list[T]:
        """All ranks' results of `fn`, on the rank that looks after their folder; elsewhere nothing that is of use.
        Errors as of `agree`."""
        if self.apart:
            return self.together(what, fn)
        return self._talk(what, _listed(fn), joined, Answer[list[T]].without_result).result or []

    def of_leaders(self, what: str, fn: Callable[[], T]) -> list[T]:
        """The results of `fn` of the ranks that look after a folder, in their order; only these call it. Errors as of
        `agree`."""
        mine = fn if self.leads else lambda: None
        if self.apart:
            found = self.together(what, mine)
            return [found[rank] for rank in self.leaders]  # pyright: ignore[reportReturnType]
        return [self.agree(what, mine, leftmost)]  # pyright: ignore[reportReturnType]

    def first(self, what: str, fn: Callable[[], T]) -> T:
        """The result of `fn` of the rank that looks after this rank's folder; only such ranks call it."""
        return self.of_leaders(what, fn)[self.leaders.index(self.sharing[0])]

    def _talk(
        self, what: str, fn: Callable[[], T], merge: Merge[T], heard: Callable[[Answer[T]], Answer[T]] | None = None
    ) -> Answer[T]:
        """The ranks' answers as one; `heard`: what of it others than the first rank hear."""
        mine = found = Answer[T].of(self.rank, fn)
        if self.group is not None:
            try:
                self.meets(True)
                found = self.group.talk(mine, partial(Answer[T].merged, merge), self._wait, heard)
                self.meets(False)
            except Unsaid as failure:
                raise CheckpointError(f"{what}: {failure}") from failure.__cause__
            except Aborted:
                raise
            except Exception as lost:
                reason = next(iter(mine.failures), "") or "; ".join(map(str, mine.mistakes)) or failure_line(lost)
                raise CheckpointError(f"{what}: a rank is lost ({reason})") from lost
        if found.mistakes:
            raise UserError(*found.mistakes)
        if found.failures:
            lines = [f"{named_ranks(ranks)}: {why}" for why, ranks in found.failures.items()]
            raise CheckpointError(f"{what}: {'; '.join(found.failures if self.world == 1 else lines)}")
        return found

    def _wait(self, work: Any) -> None:
        """Waits for a collective, as long as nobody ends the wait."""
        if self.abort is not None:
            self.abort.until("the other ranks", work.is_completed, _POLL_S)
        work.wait()


def _listed(fn: Callable[[], T]) -> Callable[[], list[T]]:
    @wraps(fn)
    def listed() -> list[T]:
        return [fn()]

    return listed
