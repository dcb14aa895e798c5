"""The layouts in which a job can go on with fewer processes, the best one first. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass, replace

from ...configs.errors import UserError
from ...configs.reading.layout import relaid
from ...configs.schema import Config
from ...configs.strict_json import JsonError, expect_int, expect_list, expect_object, expect_text
from ...configs.validation.general import validate
from ...configs.validation.layouts import sized
from .resplit import Splits, StageHoldings, resplits


@dataclass(frozen=True)
class Way:
    """A layout that is a job that could be started.

    Args:
        rung: of the ladder that it is of; empty: the job as it is.
        layout: as `configs.reading.layout.relaid` reads it.
        members: processes in its mesh.
        stages: pipeline ranks; the slots of a stage stand together.
        block: ranks that share a replica's stage (tp · cp); their slots stand together.
        holdings: what the ranks of each stage hold, where stages may be split anew.
        splits: of the layers over the stages among which there is a choice.
    """

    rung: str
    layout: str
    members: int
    stages: int = 1
    block: int = 1
    holdings: StageHoldings | None = None
    splits: Splits | None = None

    @property
    def replicas(self) -> int:
        """Data parallel ranks."""
        return self.members // (self.stages * self.block)

    def dump(self) -> list[object]:
        """For JSON."""
        return list(astuple(self))

    def settled(self) -> list[Way]:
        """It with each of its splits; in the order of these."""
        splits, holdings = self.splits, self.holdings
        if splits is None or holdings is None:
            return [self]
        numbers = range(len(splits.counts))
        return [
            replace(self, layout=splits.settled(self.layout, n), holdings=holdings.split(splits, n), splits=None)
            for n in numbers
        ]

    @staticmethod
    def load(row: object) -> Way:
        """What `dump` gave.

        Raises:
            JsonError: it is something else.
        """
        values = expect_list(row, "a way")
        if len(values) != 7:
            raise JsonError(f"a way is 7 values, not {len(values)}")
        rung, layout = expect_text(values[0], "rung"), expect_text(values[1], "layout")
        members, stages, block = (expect_int(each, "a size", 1) for each in values[2:5])
        holdings = None if values[5] is None else StageHoldings.load(values[5])
        splits = None if values[6] is None else Splits.load(values[6])
        if (
            members % (stages * block)
            or (holdings is not None and len(holdings.units) != stages)
            or (splits is not None and max(splits.placement) + 1 != stages)
        ):
            raise JsonError(f"{members} members are no replicas of {stages} stages of {block}")
        return Way(rung, layout, members, stages, block, holdings, splits)


@dataclass(frozen=True)
class Ladder:
    """What a job's watcher tries when processes are lost.

    Args:
        rungs: in this order.
        ways: layouts that the job can have, the best one first, which is its own; none: its own alone.
        grow: whether new processes are started to come back to a better one.
    """

    rungs: tuple[str, ...] = ("spare", "respawn")
    ways: tuple[Way, ...] = ()
    grow: bool = False

    @staticmethod
    def of(cfg: Config) -> Ladder:
        """Of a job whose faults are mended."""
        return Ladder(cfg.faults.ladder, ways(cfg), cfg.faults.grow) if cfg.faults.recover else Ladder()

    def dump(self) -> dict[str, object]:
        """For JSON."""
        return {"rungs": list(self.rungs), "ways": [way.dump() for way in self.ways], "grow": self.grow}

    @staticmethod
    def load(found: object) -> Ladder:
        """What `dump` gave.

        Raises:
            JsonError: it is something else.
        """
        known = expect_object(found, "the ladder", ("rungs", "ways", "grow"))
        rungs = tuple(expect_text(each, "a rung") for each in expect_list(known["rungs"], "rungs"))
        listed = tuple(Way.load(each) for each in expect_list(known["ways"], "ways"))
        return Ladder(rungs, listed, known["grow"] is True)


def relaid_for(cfg: Config, layout: str, members: int) -> Config:
    """The job in a layout that a plan names, for the members that it has.

    Raises:
        UserError: the layout is none for this job, or for so many.
    """
    laid = relaid(cfg, layout)
    problems = validate(laid, members)
    if problems:
        raise UserError(*problems)
    return laid


def ways(cfg: Config) -> tuple[Way, ...]:
    """The job as it is, then, rung by rung of `faults.ladder`, the layouts of fewer members that it can go on in."""
    found = [_way(cfg, "", "")]
    for rung in cfg.faults.ladder:
        for layout in _LAYOUTS[rung](cfg) if rung in _LAYOUTS else ():
            laid = relaid(cfg, layout)
            if laid.parallel.ranks < cfg.parallel.ranks and not validate(laid):
                found.append(_way(laid, rung, layout))
    return tuple(found)


def _way(cfg: Config, rung: str, layout: str) -> Way:
    p = cfg.parallel
    anew = "resplit" in cfg.faults.ladder and rung in ("", "shrink", "resplit") and (p.pp > 1 or rung == "resplit")
    holdings = StageHoldings.of(cfg) if anew else None
    splits = Splits.of(cfg) if rung == "resplit" and p.pp > 1 else None
    return Way(rung, layout, p.ranks, p.pp, p.tp * p.cp, holdings, splits)


def _smaller(cfg: Config) -> Iterator[str]:
    """Data parallelism of every smaller size that the batch allows, the largest first."""
    microbatches = cfg.train.global_batch // cfg.train.micro_batch
    yield from (f"dp={size}" for size in range(cfg.parallel.dp - 1, 0, -1) if microbatches % size == 0)


def _listed(cfg: Config) -> Iterator[str]:
    for layout in cfg.faults.layouts:
        yield from sized(cfg, layout)


_LAYOUTS: dict[str, Callable[[Config], Iterable[str]]] = {
    "shrink": _smaller,
    "resplit": resplits,
    "layouts": _listed,
}
"""The layouts of each rung that has some, the best one first."""
