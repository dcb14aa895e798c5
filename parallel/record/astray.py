"""Which rank does not make the calls that it should: compared with those of its pipeline stage, which make the same.

Two ranks that disagree do not say which of them is wrong. The other replicas do, and where there are none, what each
did in the step before.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .stand import TRANSFERS, Call, Stand
from .verdict_words import Places, call_words, ranks_words

SKIPPED, OTHER_CALL, OTHER_SIZE, UNSENT = "skipped collective", "other collective", "other size", "receive without send"
_UNEQUAL = {"all_to_all"}
"""Collectives in which ranks give different amounts."""

Sign = tuple[str, int, int]
"""Kind, operation and microbatch of a call."""


@dataclass(frozen=True)
class _Deviation:
    at: int
    """Nanoseconds; of several the first is the cause."""
    ranks: tuple[int, ...]
    kind: str
    line: str


def find_astray(stands: Mapping[int, Stand], places: Places) -> tuple[tuple[int, ...], str, str] | None:
    """The ranks that went astray first, what sort of fault that is, and a line; None: all make the same calls."""
    found: list[_Deviation] = []
    stages: dict[int, list[Stand]] = {}
    for stand in stands.values():
        stages.setdefault(places.stage(stand.rank), []).append(stand)
    for peers in stages.values():
        steps = sorted({call.step for stand in peers for call in stand.calls})
        for step, axis in itertools.product(steps, sorted({c.axis for stand in peers for c in stand.calls})):
            found += _compare(_calls(peers, axis, transfers=False), step, axis, places)
            # Who sends and who receives, and in which order, depends on the place along the axis.
            for alike in _by_place(peers, axis):
                found += _compare(_calls(alike, axis, transfers=True), step, axis, places)
    first = min(found, key=lambda each: each.at, default=None)
    return None if first is None else (first.ranks, first.kind, first.line)


def _calls(peers: Sequence[Stand], axis: str, *, transfers: bool) -> list[Stand]:
    """The ranks that stand along an axis, with their transfers over it alone, or their collectives."""
    return [
        replace(stand, calls=tuple(c for c in stand.calls if c.axis == axis and (c.kind in TRANSFERS) == transfers))
        for stand in peers
        if axis in stand.members or any(call.axis == axis for call in stand.calls)
    ]


def _by_place(peers: Sequence[Stand], axis: str) -> list[list[Stand]]:
    """The ranks by their place along an axis."""
    found: dict[int, list[Stand]] = {}
    for stand in peers:
        members = stand.members.get(axis, ())
        if stand.rank in members:
            found.setdefault(members.index(stand.rank), []).append(stand)
    return list(found.values())


def _compare(peers: Sequence[Stand], step: int, axis: str, places: Places) -> list[_Deviation]:
    """The first deviation of the ranks of a stage in one step over one axis."""
    lists = {stand.rank: sorted((c for c in stand.calls if c.step == step), key=lambda c: c.at) for stand in peers}
    ranks = {stand.rank: stand for stand in peers}
    if len(ranks) < 2:
        return []
    if not any(call.kind in TRANSFERS for calls in lists.values() for call in calls):
        # Of long steps the oldest calls are not there, and not on all ranks the same ones.
        begin = max((calls[0].seq for calls in lists.values() if calls), default=0)
        lists = {rank: [call for call in calls if call.seq >= begin] for rank, calls in lists.items()}
    for place in range(max((len(calls) for calls in lists.values()), default=0)):
        signs: dict[int, Sign | None] = {}
        for rank, calls in lists.items():
            if place < len(calls):
                signs[rank] = _sign(calls[place])
        expected = _expected(signs, ranks, step, axis, place)
        for rank in lists.keys() - signs.keys():
            if expected is not None and _is_past(ranks[rank], step, expected):
                signs[rank] = None
        expected = _expected(signs, ranks, step, axis, place)
        wrong = tuple(sorted(rank for rank, sign in signs.items() if sign != expected))
        if wrong:
            return [_deviation(wrong, lists, place, expected, ranks, places)]
        sized = _sizes(lists, place, ranks, step, axis, places)
        if sized is not None:
            return [sized]
    return []


def _sign(call: Call) -> Sign:
    return call.kind, call.op, call.micro_batch


def _is_past(stand: Stand, step: int, sign: Sign) -> bool:
    """Whether a rank is behind the operation that a call belongs to."""
    return stand.at[0] > step or (stand.at[0] == step and stand.phase == "step" and stand.at[2] > sign[1] >= 0)


def _expected(
    signs: Mapping[int, Sign | None], ranks: Mapping[int, Stand], step: int, axis: str, place: int
) -> Sign | None:
    """What most ranks did; of two that are as many, what was done in the step before."""
    votes = Counter(signs.values())
    (sign, most), *others = votes.most_common() or [(None, 0)]
    tied = [sign, *(other for other, count in others if count == most)]
    if len(tied) == 1:
        return sign
    before = Counter(
        _sign(calls[place])
        for stand in ranks.values()
        if len(calls := [c for c in stand.calls if (c.axis, c.step) == (axis, step - 1)]) > place
    )
    return max(tied, key=lambda each: before[each] if each is not None else -1)


def _deviation(
    wrong: tuple[int, ...],
    lists: Mapping[int, Sequence[Call]],
    place: int,
    expected: Sign | None,
    ranks: Mapping[int, Stand],
    places: Places,
) -> _Deviation:
    rank, right = wrong[0], [rank for rank in lists if rank not in wrong and place < len(lists[rank])]
    mine = lists[rank][place] if place < len(lists[rank]) else None
    theirs = lists[right[0]][place] if right else None
    at = mine.at if mine is not None else theirs.at if theirs is not None else 0
    on = f" on {ranks[rank].host}" if ranks[rank].host else ""
    where = _where(mine or theirs, rank, places)
    who = f"{ranks_words(wrong)}{on}"
    unexpected = expected is None or expected[0] != "receive" or _extra(lists, wrong)
    if mine is not None and mine.kind == "receive" and unexpected:
        return _Deviation(at, wrong, UNSENT, f"{who} waits {where} for a {call_words(mine)} that nobody sends")
    following = lists[right[0]][place + 1] if right and len(lists[right[0]]) > place + 1 else None
    left_out = mine is None or (following is not None and _sign(mine) == _sign(following)) or _fewer(lists, wrong)
    if left_out and theirs is not None:
        there = _where(theirs, right[0], places)
        line = f"{who} left out the {call_words(theirs)} that {ranks_words(right)} made {there}"
        return _Deviation(at, wrong, SKIPPED, line)
    assert mine is not None
    other = f", where {ranks_words(right)} made {call_words(theirs)}" if theirs is not None else ", which no other made"
    return _Deviation(at, wrong, OTHER_CALL, f"{who} made {call_words(mine)} {where}{other}")


def _extra(lists: Mapping[int, Sequence[Call]], wrong: tuple[int, ...]) -> bool:
    most = max((len(calls) for rank, calls in lists.items() if rank not in wrong), default=0)
    return len(lists[wrong[0]]) > most


def _fewer(lists: Mapping[int, Sequence[Call]], wrong: tuple[int, ...]) -> bool:
    return len(lists[wrong[0]]) < min((len(calls) for rank, calls in lists.items() if rank not in wrong), default=0)


def _where(call: Call | None, rank: int, places: Places) -> str:
    if call is None:
        return ""
    token = places.token(rank, call.op)
    return f"in step {call.step + 1}" + (f" at {token}" if token else "")


def _sizes(
    lists: Mapping[int, Sequence[Call]],
    place: int,
    ranks: Mapping[int, Stand],
    step: int,
    axis: str,
    places: Places,
) -> _Deviation | None:
    """Members of one group that give another number of bytes than the others."""
    calls = {rank: mine[place] for rank, mine in lists.items() if place < len(mine)}
    groups: dict[int, dict[int, Call]] = {}
    for rank, call in calls.items():
        if call.kind not in _UNEQUAL and call.kind not in TRANSFERS:
            groups.setdefault(call.group, {})[rank] = call
    for members in groups.values():
        if len({call.nbytes for call in members.values()}) < 2:
            continue
        votes = Counter(call.nbytes for call in calls.values())
        before = {
            stand.rank: mine[place].nbytes
            for stand in ranks.values()
            if len(mine := [c for c in stand.calls if (c.axis, c.step) == (axis, step - 1)]) > place
        }
        right = max(votes, key=lambda size: (votes[size], sum(size == other for other in before.values())))
        wrong = tuple(sorted(rank for rank, call in members.items() if call.nbytes != right))
        call = members[wrong[0]]
        on = f" on {ranks[wrong[0]].host}" if ranks[wrong[0]].host else ""
        where = _where(call, wrong[0], places)
        line = f"{ranks_words(wrong)}{on} made {call_words(call)} {where}, where the others give {right} bytes"
        return _Deviation(call.at, wrong, OTHER_SIZE, line)
    return None
