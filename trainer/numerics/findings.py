"""What the guards found, on all ranks together, as one line and as events. No torch here."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SHOWN = 3
"""Places that the error's line names; all are events."""


@dataclass(frozen=True)
class ChangedBits:
    """A place whose bits a rank found changed, or to be others than those of the copies.

    Args:
        rank, host: that hold it.
        what: "parameter", "gradient", "master", or the name of a state.
        name: of the parameter.
        window: when.
    """

    rank: int
    host: str
    what: str
    name: str
    window: str

    def __str__(self) -> str:
        return f"{self.what} {self.name} on rank {self.rank} ({self.host}) {self.window}"


@dataclass(frozen=True)
class DifferentCopies:
    """What a rank knows of parameters of which it holds copies, and not all copies are equal.

    Args:
        holders: the ranks that hold them.
        names: of the parameters.
        sums: of this rank's copies of them.
    """

    holders: tuple[int, ...]
    names: tuple[str, ...]
    sums: tuple[int, ...]


@dataclass(frozen=True)
class RankFindings:
    """What one rank has to say when bits were found changed.

    Args:
        rank, host: which, and where it is.
        changed: inside the windows of its checksums.
        copies: of parameters that differ from some other rank's.
        good: updates after which the state was found good, as far as this rank can tell.
    """

    rank: int
    host: str
    changed: tuple[ChangedBits, ...] = ()
    copies: tuple[DifferentCopies, ...] = ()
    good: int = 0


@dataclass(frozen=True)
class Corruption:
    """What all ranks conclude.

    Args:
        step: in which it was found, before its update.
        places: the suspects.
        good: updates after which the state was checked last and found good.
        undecided: whether some of the places are both of two copies, of which one is right.
    """

    step: int
    places: tuple[ChangedBits, ...]
    good: int
    undecided: bool = field(default=False)

    def text(self, checkpoint: Path | None) -> str:
        """In one line.

        Args:
            checkpoint: the newest one from before.
        """
        shown = "; ".join(map(str, self.places[:SHOWN]))
        more = f"; and {len(self.places) - SHOWN} more places (events.jsonl)" if len(self.places) > SHOWN else ""
        which = "; two copies cannot tell which is right: faults.numerics.checksums can" if self.undecided else ""
        if checkpoint is None:
            then = "there is no checkpoint from before: start again without that device"
        else:
            then = f"go on from the newest checkpoint from before, without that device: checkpoint.resume={checkpoint}"
        return (
            f"bits changed by themselves, found in step {self.step} before its update: {shown}{more}{which}; "
            f"the state after step {self.good} was the last found good; {then}"
        )

    def events(self) -> list[dict[str, Any]]:
        """The fields of an event for each place."""
        return [asdict(place) | {"step": self.step, "good_step": self.good} for place in self.places]


def conclude(step: int, ranks: Iterable[RankFindings]) -> Corruption:
    """What follows from every rank's findings: places of changed bits, and the minority among differing copies."""
    everyone = sorted(ranks, key=lambda each: each.rank)
    hosts = {each.rank: each.host for each in everyone}
    places = [place for each in everyone for place in each.changed]
    known = {(place.rank, place.name) for place in places}
    told: dict[tuple[tuple[int, ...], tuple[str, ...]], dict[int, tuple[int, ...]]] = defaultdict(dict)
    for each in everyone:
        for copies in each.copies:
            told[copies.holders, copies.names][each.rank] = copies.sums
    undecided = False
    for (holders, names), sums in told.items():
        for number, name in enumerate(names):
            suspects = _minority({rank: found[number] for rank, found in sums.items()})
            if any((rank, name) in known for rank in suspects):
                continue  # its own checksums have said so already
            tie = bool(suspects) and len(suspects) == len(holders)
            undecided |= tie
            for rank in suspects:
                others = set(holders) - ({rank} if tie else set(suspects))
                differs = f"differs from that of rank {', '.join(map(str, sorted(others)))}"
                places.append(ChangedBits(rank, hosts[rank], "parameter", name, differs))
    return Corruption(step, tuple(places), min(each.good for each in everyone), undecided)


def _minority(sums: dict[int, int]) -> list[int]:
    """The ranks whose sum is not that of most; all, where no sum is that of most; none, where all are equal."""
    (most, count), *others = Counter(sums.values()).most_common()
    if not others:
        return []
    if count == others[0][1]:
        return sorted(sums)
    return sorted(rank for rank, found in sums.items() if found != most)
