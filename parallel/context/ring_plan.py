"""Where the rows of each rank travel in a ring, worked out once for each way of dealing out tokens.

A ring takes each rank's rows (keys to the queries of others, or queries to their keys) once round the ranks, toward
lower ones or higher ones. A row has business at a rank if one of the rank's tokens can see it, or be seen by it; all
ranks know all rows, so each can work out the whole plan:

- Rows go from one rank where some of them have business to the next such rank. Others are passed by.
- A hop takes the rows with business at any of the ranks still to come, no others. Toward lower ranks and with zigzag
  dealing-out, the ranks before the wrap-around need all the keys and those behind it the front half.
- In step i a rank meets the rows of the rank i places away, so each has one block to work on at a time.

What is made of the rows returns to their owner at once from where it is complete.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.mask import Mask, Remembers, TokenIndex, TokenLayout
from ..kernels.upload import upload

_NEVER = 1 << 62
"""Order of a row that only fills up a batch: no query comes after it."""


@dataclass(frozen=True)
class RowSelection(Remembers):
    """Some of n rows of each sequence, in their order, in equally many columns.

    Args:
        count: columns.
        start: the first row, where they are neighbours and the same in all sequences; else the next three say which.
        index: (B or 1, count) rows.
        padding: (B, count) true where a sequence has fewer rows; `index` is any row there.
        filled: sequences, columns and rows of what is no padding, each (columns in use,).
    """

    count: int
    start: int = 0
    index: Tensor | None = None
    padding: Tensor | None = None
    filled: tuple[Tensor, Tensor, Tensor] | None = None

    @staticmethod
    def of(chosen: Tensor) -> RowSelection:
        """From (B or 1, n) booleans."""
        # One shape for all sequences, which batched products need: the shorter ones are filled up.
        counts = chosen.sum(1)
        count = int(counts.max())
        # A stable sort of "not chosen" puts the chosen rows first and leaves them in their order.
        index = (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
        columns = torch.arange(count)
        padding = columns >= counts[:, None]
        if not padding.any():
            # The usual case by far (zigzag halves, whole blocks): a slice, which copies nothing.
            start = int(index[0, 0]) if count else 0
            if torch.equal(index, (start + columns).expand_as(index)):
                return RowSelection(count, start)
            return RowSelection(count, 0, index)
        sequences, used = (~padding).nonzero(as_tuple=True)
        return RowSelection(count, 0, index, padding, (sequences, used, index[sequences, used]))

    def take(self, x: Tensor) -> Tensor:
        """(B, n, …) → (B, count, …); a view where rows are neighbours; anything in the padding."""
        if self.index is None:
            return x[:, self.start : self.start + self.count]
        index = self.once(upload, self.index, x.device)
        if len(index) == 1:
            return x.index_select(1, index[0])
        return x[torch.arange(len(x), device=x.device)[:, None], index]

    def put(self, x: Tensor, part: Tensor, *, add: bool = False) -> None:
        """Writes, or adds, (B, count, …) without the padding into the rows of x (B, n, …)."""
        if self.filled is not None:
            sequences, columns, rows = (self.once(upload, y, x.device) for y in self.filled)
            # Padding points at some row too: written there, it would overwrite or add to a real one.
            part, at = part[sequences, columns], (sequences, rows)
        elif self.index is not None:
            index = self.once(upload, self.index, x.device)
            at = (torch.arange(len(x), device=x.device)[:, None], index.expand(len(x), -1))
        else:
            at = (slice(None), slice(self.start, self.start + self.count))
        x[at] = x[at] + part if add else part

    def rows(self, rows: TokenIndex) -> TokenIndex:
        """Of these rows; padding comes after every query."""
        order, documents = rows.order, rows.documents
        if self.index is not None and len(self.index) > 1:
            # Sequences chose different rows, so they need an order each where one did for all.
            order = order.expand(len(self.index), -1)
        order = self.take(order)
        if self.padding is not None:
            order = order.masked_fill(self.padding, _NEVER)
        return TokenIndex(order, None if documents is None else self.take(documents))


@dataclass(frozen=True)
class Stop:
    """One rank's rows at another.

    Args:
        owner, rank: whose, and where.
        step: when, in 1 to P − 1.
        source: where they come from: the stop before, or the owner.
        following: the next stop, or none.
        carried: which of the owner's rows arrive.
        rows: these.
        onward: which of them go on.
        complete, complete_at_home: which of them do not, among those that arrived and among the owner's; or none.
        used, used_at_home: which have business here, likewise.
        mine: (first, last) of the rank's own rows that have business with them.
    """

    owner: int
    rank: int
    step: int
    source: int
    following: int | None
    carried: RowSelection
    rows: TokenIndex
    onward: RowSelection | None
    complete: RowSelection | None
    complete_at_home: RowSelection | None
    used: RowSelection
    used_at_home: RowSelection
    mine: tuple[int, int]


@dataclass(frozen=True)
class Message:
    """A transfer of what belongs to `owner`, or was made of it; `home` where it returns there."""

    owner: int
    source: int
    to: int
    home: bool = False


@dataclass(frozen=True)
class RingPlan:
    """What one rank does. Index 0 of the lists is the local block's step, in which nothing arrives or leaves.

    Args:
        stops: of other ranks' rows here, by step.
        masks: of the queries and keys that meet in a step, where some do. Kept here, what kernels derive from them is
            worked out once for all layers.
        own: of this rank's rows elsewhere, by owner of the place.
        moves: transfers of rows, by the step that works on them, in the order in which all ranks start them.
        returns: likewise of what a step made: onward to the next stop, and home.
    """

    stops: tuple[Stop | None, ...]
    masks: dict[int, Mask]
    own: dict[int, Stop]
    moves: tuple[tuple[Message, ...], ...]
    returns: tuple[tuple[Message, ...], ...]

    def at(self, owner: int) -> Stop:
        """The stop of an owner's rows here."""
        return next(stop for stop in self.stops if stop is not None and stop.owner == owner)


class RingPlans:
    """Makes plans and keeps those of the ways of dealing out that are in use.

    Args:
        down: whether rows travel toward lower ranks.
        keys: whether it is keys that travel, or queries.
    """

    def __init__(self, *, down: bool, keys: bool) -> None:
        self._sign, self._keys = -1 if down else 1, keys
        self._known: dict[tuple[int, int | None], tuple[weakref.ref[TokenLayout], RingPlan]] = {}

    def of(self, layout: TokenLayout, window: int | None) -> RingPlan:
        """This rank's plan."""
        key = (id(layout), window)
        found = self._known.get(key)
        if found is None:
            known = self._known
            # By identity, since comparing all tokens each time costs more than planning; an id is used again once its
            # object is gone, hence the entry goes with it.
            gone = weakref.ref(layout, lambda _: known.pop(key, None))
            found = known[key] = gone, _ring_plan(layout, window, self._sign, self._keys)
        return found[1]


def _ring_plan(layout: TokenLayout, window: int | None, sign: int, keys: bool) -> RingPlan:
    places, length = _places(layout.ranks)
    ranks, me = len(places), layout.rank
    sorted_places = [place.sort(dim=1).values for place in places]
    # Of every owner at every rank, worked out by all alike: no rank has to be told what it will be sent.
    business = [[_partnered(place, others, length, window, ahead=keys) for others in sorted_places] for place in places]
    routes = [[(owner + sign * step) % ranks for step in range(1, ranks)] for owner in range(ranks)]
    routes = [[rank for rank in route if business[owner][rank].any()] for owner, route in enumerate(routes)]
    stops: list[Stop | None] = [None] * ranks
    own: dict[int, Stop] = {}
    for owner, route in enumerate(routes):
        for index, rank in enumerate(route):
            if me in (owner, rank):
                mine = _partnered(places[rank], sorted_places[owner], length, window, ahead=not keys)
                stop = _stop(layout.ranks[owner], owner, route, index, business[owner], mine, sign)
                if rank == me:
                    stops[stop.step] = stop
                else:
                    own[rank] = stop
    # Each mask is that of the very rows that meet: of those here with business, and of those that arrived.
    masks = {0: Mask.of(layout.mine, window)}
    masks |= {stop.step: _mask(stop, layout.mine, window, keys) for stop in stops if stop is not None}
    return RingPlan(tuple(stops), masks, own, *_messages(routes, sign, me))


def _mask(stop: Stop, mine: TokenIndex, window: int | None, keys: bool) -> Mask:
    here = mine.part(*stop.mine)
    return Mask(here, stop.rows, window) if keys else Mask(stop.used.rows(stop.rows), here, window)


def _places(ranks: Sequence[TokenIndex]) -> tuple[list[Tensor], int]:
    """(B or 1, n) of each rank: document · length + order; and a length above every order."""
    # One number per token, so that one sorted search finds neighbours and a change of document alike.
    length = 1 + max(int(rows.order.max()) for rows in ranks)
    found = []
    for rows in ranks:
        documents = None if rows.documents is None else rows.documents.cpu().to(torch.int64)
        found.append(rows.order if documents is None else rows.order + documents * length)
    return found, length


def _partnered(places: Tensor, others: Tensor, length: int, window: int | None, *, ahead: bool) -> Tensor:
    """(B or 1, n) which rows can see one of the others, which are sorted, or (`ahead`) be seen by one."""
    # The nearest partner is enough: if it is of another document or outside the window, so are all beyond it.
    at = torch.searchsorted(others, places.contiguous(), right=not ahead)
    if not ahead:
        at -= 1
    nearest = others.gather(1, at.clamp(0, others.shape[1] - 1))
    same = nearest.div(length, rounding_mode="floor") == places.div(length, rounding_mode="floor")
    found = (at >= 0) & (at < others.shape[1]) & same
    if window is not None:
        found &= (nearest - places).abs() < window
    return found


def _stop(
    rows: TokenIndex, owner: int, route: Sequence[int], index: int, business: Sequence[Tensor], mine: Tensor, sign: int
) -> Stop:
    rank = route[index]
    following = route[index + 1] if index + 1 < len(route) else None
    needed = torch.stack([business[later] for later in route[index:]]).any(dim=0)
    later = torch.zeros_like(needed)
    if following is not None:
        later = torch.stack([business[later] for later in route[index + 1 :]]).any(dim=0)
    carried = RowSelection.of(needed)

    def among(chosen: Tensor) -> Tensor:
        return carried.take(chosen) if carried.padding is None else carried.take(chosen) & ~carried.padding

    done = needed & ~later  # nobody further on adds to these: what was made of them goes home from here
    used = business[rank]  # what passes through to later ranks is carried too, and not multiplied here
    touched = mine.any(dim=0).nonzero()
    return Stop(
        owner=owner,
        rank=rank,
        step=(sign * (rank - owner)) % len(business),
        source=route[index - 1] if index else owner,
        following=following,
        carried=carried,
        rows=carried.rows(rows),
        onward=RowSelection.of(among(later)) if following is not None else None,
        complete=RowSelection.of(among(done)) if done.any() else None,
        complete_at_home=RowSelection.of(done) if done.any() else None,
        used=RowSelection.of(among(used)),
        used_at_home=RowSelection.of(used),
        mine=(int(touched[0]), int(touched[-1]) + 1),
    )


def _messages(
    routes: Sequence[Sequence[int]], sign: int, me: int
) -> tuple[tuple[tuple[Message, ...], ...], tuple[tuple[Message, ...], ...]]:
    """This rank's moves and returns by step."""
    ranks = len(routes)
    moves: list[list[Message]] = [[] for _ in range(ranks)]
    returns: list[list[Message]] = [[] for _ in range(ranks)]
    for owner, route in enumerate(routes):
        for index, rank in enumerate(route):
            step = (sign * (rank - owner)) % ranks
            moves[step].append(Message(owner, route[index - 1] if index else owner, rank))
            # Sums of what is not complete travel on with the rows they belong to; both in the step that made them.
            returns[step].append(Message(owner, rank, owner, home=True))
            if index + 1 < len(route):
                returns[step].append(Message(owner, rank, route[index + 1]))

    def mine(slot: list[Message]) -> tuple[Message, ...]:
        return tuple(message for message in _in_rounds(slot) if me in (message.source, message.to))

    return tuple(map(mine, moves)), tuple(map(mine, returns))


def _in_rounds(messages: Sequence[Message]) -> list[Message]:
    """So ordered that no rank waits long for another's earlier transfers: in rounds of separate pairs. A rank of a
    communicator that does one transfer after the other then never waits in a circle."""
    busy: dict[int, set[int]] = {}
    rounds = []
    for message in messages:
        taken = busy.setdefault(message.source, set()) | busy.setdefault(message.to, set())
        # Greedy edge colouring: at most twice as many rounds as one rank has transfers, and usually just as many.
        turn = next(turn for turn in range(len(taken) + 1) if turn not in taken)
        busy[message.source].add(turn)
        busy[message.to].add(turn)
        rounds.append(turn)
    return [message for _, message in sorted(zip(rounds, messages, strict=True), key=lambda pair: pair[0])]
