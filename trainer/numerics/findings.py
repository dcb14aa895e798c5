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
        what: "parameter", "gradient", "master", the name of a state, or "recomputed".
        name: of the parameter, or what was recomputed.
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
class RemadeTensor:
    """A tensor that was made otherwise in the second run of a part.

    Args:
        part: of a layer.
        number: of the tensor among those of the part, in the order in which they are made.
        tensor: the same in words.
        turn: the how many-th microbatch of the rank, from 0 on.
        microbatch: of the global batch.
    """

    part: str
    number: int
    tensor: str
    turn: int
    microbatch: int


@dataclass(frozen=True)
class RankFindings:
    """What one rank has to say when bits were found changed.

    Args:
        rank, host: which, and where it is.
        changed: inside the windows of its checksums.
        copies: of parameters that differ from some other rank's.
        good: updates after which the state was found good, as far as this rank can tell.
        remade: what second runs made otherwise.
    """

    rank: int
    host: str
    changed: tuple[ChangedBits, ...] = ()
    copies: tuple[DifferentCopies, ...] = ()
    good: int = 0
    remade: tuple[RemadeTensor, ...] = ()


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

    def text(self, checkpoint: Path | None, *, saving: bool = False) -> str:
        """In one line.

        Args:
            checkpoint: the newest one from before.
            saving: it was found when the state before the step was to be saved.
        """
        when = f"after step {self.step - 1}, before saving" if saving else f"in step {self.step} before its update"
        shown = "; ".join(map(str, self.places[:SHOWN]))
        more = f"; and {len(self.places) - SHOWN} more places (events.jsonl)" if len(self.places) > SHOWN else ""
        which = "; two copies cannot tell which is right: faults.numerics.checksums can" if self.undecided else ""
        if checkpoint is None:
            then = "there is no checkpoint from before: start again without that device"
        else:
            then = f"go on from the newest checkpoint from before, without that device: checkpoint.resume={checkpoint}"
        return (
            f"bits changed by themselves, found {when}: {shown}{more}{which}; "
            f"the state after step {self.good} was the last found good; {then}"
        )

    def events(self) -> list[dict[str, Any]]:
        """The fields of an event for each place."""
        return [asdict(place) | {"step": self.step, "good_step": self.good} for place in self.places]


def conclude(step: int, ranks: Iterable[RankFindings]) -> Corruption:
    """What follows from every rank's findings: places of changed bits, the first tensors of a part that were made
    otherwise, and the minority among differing copies."""
    everyone = sorted(ranks, key=lambda each: each.rank)
    hosts = {each.rank: each.host for each in everyone}
    places = [place for each in everyone for place in each.changed] + _first_remade(everyone)
    known = {(place.rank, place.name) for place in places if place.what == "parameter"}
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


def _first_remade(ranks: Iterable[RankFindings]) -> list[ChangedBits]:
    """Of each part, in each turn, the tensor that was the first to differ on any rank: what ranks exchange inside a
    part carries it to others, where later tensors differ."""
    found: dict[tuple[str, int], list[tuple[RankFindings, RemadeTensor]]] = defaultdict(list)
    for each in ranks:
        for remade in each.remade:
            found[remade.part, remade.turn].append((each, remade))
    places = []
    for members in found.values():
        first = min(remade.number for _, remade in members)
        for each, remade in members:
            if remade.number == first:
                name, when = (
                    f"{remade.tensor} of {remade.part}",
                    f"made otherwise in its second run, microbatch {remade.microbatch}",
                )
                places.append(ChangedBits(each.rank, each.host, "recomputed", name, when))
    return places


def _minority(sums: dict[int, int]) -> list[int]:
    """The ranks whose sum is not that of most; all, where no sum is that of most; none, where all are equal."""
    (most, count), *others = Counter(sums.values()).most_common()
    if not others:
        return []
    if count == others[0][1]:
        return sorted(sums)
    return sorted(rank for rank, found in sums.items() if found != most)
