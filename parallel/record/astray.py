"""Which rank does not make the calls that it should: compared with those of its pipeline stage, which make the same.

Two ranks that disagree do not say which of them is wrong. The other replicas do, and where there are none, what each
did in the step before.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from .stand import MOST_CALLS, TRANSFERS, Call, Stand
from .verdict_words import Places, call_words, ranks_words

SKIPPED, OTHER_CALL, OTHER_SIZE, UNSENT = "skipped collective", "other collective", "other size", "receive without send"
_UNEQUAL = {"all_to_all"}
"""Collectives in which ranks give different amounts."""

Sign = tuple[str, str, int, int]
"""Axis, kind, operation and microbatch of a call."""


@dataclass(frozen=True)
class _Deviation:
    at: int
    """Nanoseconds; of several the first is the cause."""
    ranks: tuple[int, ...]
    kind: str
    line: str


def find_astray(stands: Mapping[int, Stand], places: Places) -> tuple[tuple[int, ...], str, str] | None:
    """The ranks that went astray first, what sort of fault that is, and a line; None: all make the same calls."""
    found = list(_other_receives(stands, places))
    stages: dict[int, list[Stand]] = {}
    for stand in stands.values():
        stages.setdefault(places.stage(stand.rank), []).append(stand)
    for peers in stages.values():
        steps = sorted({call.step for stand in peers for call in stand.calls})
        for step, alike in itertools.product(steps, _alike(peers)):
            found += _compare(alike, step, before=step - 1 in steps, places=places)
    first = min(found, key=lambda each: each.at, default=None)
    return None if first is None else (first.ranks, first.kind, first.line)


def _other_receives(stands: Mapping[int, Stand], places: Places) -> Iterator[_Deviation]:
    """Receives of a size that is not sent: what is sent there is for another one, which comes later or never."""
    sent = {
        (stand.rank, call.peer, call.axis, call.group, call.seq): call
        for stand in stands.values()
        for call in stand.calls
        if call.kind == "send"
    }
    for stand in stands.values():
        for call in stand.calls:
            other = sent.get((call.peer, stand.rank, call.axis, call.group, call.seq))
            if call.kind != "receive" or other is None or other.nbytes == call.nbytes:
                continue
            usual = {each.nbytes for each in stand.calls if each.key == call.key and each is not call}
            if call.nbytes in usual and other.nbytes not in usual:
                mistaken, at, kind = stands[call.peer], other.at, OTHER_SIZE
                what = f"made {call_words(other)}, where {call.nbytes} bytes are due"
            else:
                mistaken, at, kind = stand, call.at, UNSENT
                what = f"waits for a {call_words(call)} that nobody sends: what comes has {other.nbytes} bytes"
            on = f" on {mistaken.host}" if mistaken.host else ""
            line = f"{ranks_words((mistaken.rank,))}{on}, {_where(call, stand.rank, places)}, {what}"
            yield _Deviation(at, (mistaken.rank,), kind, line)


def _alike(peers: Sequence[Stand]) -> Iterator[list[Stand]]:
    """Ranks, each with some of its calls, that make the same calls in the same order."""

    def only(stands: Iterable[Stand], wanted: Callable[[Call], bool]) -> list[Stand]:
        return [replace(stand, calls=tuple(call for call in stand.calls if wanted(call))) for stand in stands]

    # The step's own thread; what runs beside it keeps an order along its axis alone.
    yield only(peers, lambda call: call.kind not in TRANSFERS and not call.beside)
    for axis in sorted({call.axis for stand in peers for call in stand.calls}):
        yield only(peers, lambda call, axis=axis: call.axis == axis and call.kind not in TRANSFERS and call.beside)
        # Who sends and who receives, and in which order, depends on the place along the axis.
        by_place: dict[int, list[Stand]] = {}
        for stand in peers:
            if stand.rank in (members := stand.members.get(axis, ())):
                by_place.setdefault(members.index(stand.rank), []).append(stand)
        for stands in by_place.values():
            yield only(stands, lambda call, axis=axis: call.axis == axis and call.kind in TRANSFERS)


def _compare(peers: Sequence[Stand], step: int, *, before: bool, places: Places) -> list[_Deviation]:
    """The first deviation of ranks that are alike in one step; `before`: what they did in the step before is known."""
    lists = _aligned({stand.rank: [call for call in stand.calls if call.step == step] for stand in peers})
    earlier = [[_sign(call) for call in stand.calls if call.step == step - 1] for stand in peers] if before else []
    ranks = {stand.rank: stand for stand in peers}
    if len(ranks) < 2:
        return []
    for place in range(max((len(calls) for calls in lists.values()), default=0)):
        there = {rank: calls[place] for rank, calls in lists.items() if place < len(calls)}
        signs: dict[int, Sign | None] = {rank: _sign(call) for rank, call in there.items()}
        usual = Counter(signs[place] if place < len(signs) else None for signs in earlier)
        expected = _expected(signs, usual)
        for rank in lists.keys() - signs.keys():
            if expected is not None and _is_past(ranks[rank], step, expected):
                signs[rank] = None
        expected = _expected(signs, usual)
        wrong = tuple(sorted(rank for rank, sign in signs.items() if sign != expected))
        if wrong:
            then = {earlier_signs[place + 1] for earlier_signs in earlier if len(earlier_signs) > place + 1}
            return [_deviation(wrong, lists, place, expected, then, ranks, places)]
        sized = _sizes(lists, place, ranks, step, places)
        if sized is not None:
            return [sized]
    return []


def _aligned(lists: dict[int, list[Call]]) -> dict[int, list[Call]]:
    """The calls of a step in their order, without the oldest ones where some ranks' were too many to be kept."""
    lists = {rank: sorted(calls, key=lambda call: call.at) for rank, calls in lists.items()}
    if max((len(calls) for calls in lists.values()), default=0) < MOST_CALLS:
        return lists
    common = set.intersection(*({(call.key, call.seq) for call in calls} for calls in lists.values() if calls))
    begins = {r: next((i for i, c in enumerate(calls) if (c.key, c.seq) in common), 0) for r, calls in lists.items()}
    return {rank: calls[begins[rank] :] for rank, calls in lists.items()}


def _sign(call: Call) -> Sign:
    return call.axis, call.kind, call.op, call.micro_batch


def _is_past(stand: Stand, step: int, sign: Sign) -> bool:
    """Whether a rank is behind the operation that a call belongs to."""
    return stand.at[0] > step or (stand.at[0] == step and stand.phase == "step" and stand.at[2] > sign[2] >= 0)


def _expected(signs: Mapping[int, Sign | None], usual: Counter[Sign | None]) -> Sign | None:
    """What most ranks did; where one stands alone, or several are as many, what was done in the step before."""
    votes = Counter(signs.values())
    most = max(votes.values(), default=0)
    tied = [sign for sign, count in votes.items() if count == most]
    if most == 1 and usual and not any(usual[sign] for sign in tied):
        return max(usual, key=lambda sign: usual[sign])
    return max(tied, key=lambda sign: usual[sign], default=None)


def _deviation(
    wrong: tuple[int, ...],
    lists: Mapping[int, Sequence[Call]],
    place: int,
    expected: Sign | None,
    then: set[Sign],
    ranks: Mapping[int, Stand],
    places: Places,
) -> _Deviation:
    """What the ranks that are wrong at a place did; `then`: what came behind it in the step before."""
    rank, right = wrong[0], [rank for rank in lists if rank not in wrong and place < len(lists[rank])]
    mine = lists[rank][place] if place < len(lists[rank]) else None
    theirs = lists[right[0]][place] if right else None
    at = mine.at if mine is not None else theirs.at if theirs is not None else 0
    on = f" on {ranks[rank].host}" if ranks[rank].host else ""
    where = _where(mine or theirs, rank, places)
    who = f"{ranks_words(wrong)}{on}"
    unexpected = expected is None or expected[1] != "receive" or _extra(lists, wrong)
    if mine is not None and mine.kind == "receive" and unexpected:
        return _Deviation(at, wrong, UNSENT, f"{who} waits {where} for a {call_words(mine)} that nobody sends")
    then = then | {_sign(lists[other][place + 1]) for other in right if len(lists[other]) > place + 1}
    left_out = mine is None or _sign(mine) in then
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
            if len(mine := [c for c in stand.calls if c.step == step - 1]) > place
        }
        right = max(votes, key=lambda size: (votes[size], sum(size == other for other in before.values())))
        wrong = tuple(sorted(rank for rank, call in members.items() if call.nbytes != right))
        call = members[wrong[0]]
        on = f" on {ranks[wrong[0]].host}" if ranks[wrong[0]].host else ""
        where = _where(call, wrong[0], places)
        line = f"{ranks_words(wrong)}{on} made {call_words(call)} {where}, where the others give {right} bytes"
        return _Deviation(call.at, wrong, OTHER_SIZE, line)
    return None
