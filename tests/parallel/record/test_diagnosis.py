"""The cause is found among ranks that wait for each other, for any fault at any place of any rank."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field, replace

import pytest

from pentad.parallel.record.diagnosis import Verdict, diagnose, waits_for_ranks
from pentad.parallel.record.stand import Call, Condition, Stand
from pentad.parallel.record.stand_text import dump_stand, load_stand
from pentad.parallel.record.verdict_words import Places, ranks_words

TP, DP, PP = 2, 2, 2
WORLD = TP * DP * PP
PLACES = Places(WORLD, (("F0@0", "BW0@0", "RG0", "NORM"), ("F0@1", "BW0@1", "RG0", "NORM")))


def _members(rank: int, axis: str) -> tuple[int, ...]:
    tp, dp = rank % TP, rank // TP % DP
    stage = rank // (TP * DP) * TP * DP
    return {
        "tp": tuple(stage + dp * TP + i for i in range(TP)),
        "dp": tuple(stage + i * TP + tp for i in range(DP)),
        "world": tuple(range(WORLD)),
        "channel 0>1": tuple(dp * TP + tp + i * TP * DP for i in range(PP)),
        "channel 1>0": tuple(dp * TP + tp + i * TP * DP for i in (1, 0)),
    }[axis]


@dataclass(frozen=True)
class _Step:
    """A call of a program: `op` and `kind` over an axis, of so many bytes."""

    op: int
    kind: str
    axis: str
    nbytes: int = 64


def _program(rank: int) -> list[_Step]:
    """What a rank does in a step."""
    first = rank < WORLD // PP
    layer = [_Step(0, "all_gather", "tp"), _Step(0, "reduce_scatter", "tp")] * 2
    back = [replace(step, op=1) for step in layer]
    hand = [_Step(0, "send" if first else "receive", "channel 0>1")]
    give = [_Step(1, "receive" if first else "send", "channel 1>0")]
    forward = [*layer, *hand] if first else [*hand, *layer]
    backward = [*give, *back] if first else [*back, *give]
    return [*forward, *backward, _Step(2, "all_reduce", "dp", 256), _Step(3, "all_reduce", "world", 24)]


@dataclass
class _Rank:
    """A rank that does its program step after step, with a fault in one of them."""

    rank: int
    calls: list[Call] = field(default_factory=list)
    counts: dict[tuple[str, str], int] = field(default_factory=dict)
    waits: Call | None = None
    step: int = 0
    at: int = 0
    stuck: str = ""

    def begin(self, step: _Step, clock: int) -> None:
        peer = -1
        if step.kind in ("send", "receive"):
            peer = next(r for r in _members(self.rank, step.axis) if r != self.rank)
        sort = (step.axis, step.kind if peer >= 0 else "")
        number = self.counts.get(sort, 0)
        self.counts[sort] = number + 1
        group = _members(self.rank, step.axis)[0]
        call = Call(step.kind, step.axis, group, peer, number, step.nbytes, self.step, 0, step.op, True, clock)
        self.calls.append(call)
        self.waits = call

    def stand(self) -> Stand:
        entered = {call.key: call.seq + 1 for call in self.calls}
        condition = {"kill": Condition.DEAD, "stop": Condition.STOPPED, "gil": Condition.FROZEN}.get(self.stuck)
        return Stand(
            rank=self.rank,
            host="h",
            condition=condition or Condition.RUNS,
            phase="data" if self.stuck == "data" else "step",
            late=True,
            idle_s=9.0,
            at=(self.step, 0, self.calls[-1].op if self.calls else -1),
            waits=self.waits if not self.stuck else None,
            entered=entered,
            calls=tuple(call for call in self.calls if call.step >= self.step - 1),
            members={axis: _members(self.rank, axis) for axis in ("tp", "dp", "world", "channel 0>1", "channel 1>0")},
            code=-9 if condition is Condition.DEAD else None,
        )


def _is_met(ranks: list[_Rank], call: Call, me: int) -> bool:
    """Whether all have come to a call."""
    if call.peer >= 0:
        sent = [c for c in ranks[call.peer].calls if (c.kind, c.axis, c.seq) == ("send", call.axis, call.seq)]
        return call.kind == "send" or any(c.nbytes == call.nbytes for c in sent)
    theirs = [c for r in _members(me, call.axis) for c in ranks[r].calls if (c.key, c.seq) == (call.key, call.seq)]
    # Where sizes differ, whoever reads gives up.
    return len(theirs) == len(_members(me, call.axis)) and len({c.nbytes for c in theirs}) == 1


def _play(kind: str, victim: int, step: int, place: int, seed: int) -> list[Stand]:
    """Runs all ranks in a random order until nothing moves; the victim has its fault at a place of a step."""
    draws = random.Random(seed)
    ranks = [_Rank(rank) for rank in range(WORLD)]
    clock = 0
    moved = True
    while moved:
        moved = False
        for one in draws.sample(ranks, WORLD):
            if one.waits is not None and _is_met(ranks, one.waits, one.rank):
                one.calls[-1] = replace(one.calls[-1], open=False)
                one.waits, moved = None, True
            program = _program(one.rank)
            if one.waits is not None or one.stuck or one.step > step + 2:
                continue
            clock += 1
            moved = True
            if one.at >= len(program):
                one.step, one.at = one.step + 1, 0
            if (one.rank, one.step, one.at) == (victim, step, place):
                if kind in ("kill", "stop", "gil", "hang", "data"):
                    one.stuck = kind
                    continue
                if kind == "receive":
                    one.begin(_Step(program[place].op, "receive", "tp"), clock)
                    one.at = -1 - one.at  # and then goes on, if it ever comes
                    continue
                if kind == "skip":
                    one.at += 1
            one.at = -1 - one.at if one.at < 0 else one.at
            if one.at >= len(program):
                one.step, one.at = one.step + 1, 0
            chosen = program[one.at]
            if (one.rank, one.step, one.at, kind) == (victim, step, place, "size"):
                chosen = replace(chosen, nbytes=2 * chosen.nbytes)
            one.begin(chosen, clock)
            one.at += 1
    return [one.stand() for one in ranks]


def _places(kind: str) -> list[tuple[int, int]]:
    """Some ranks and places of their programs."""
    every = [(victim, place) for victim in range(WORLD) for place in range(len(_program(victim)))]
    return random.Random(kind).sample(every, 7)


STOPS = {"kill": "killed", "stop": "stopped", "gil": "frozen", "hang": "hang", "data": "data stall"}


@pytest.mark.parametrize("kind", STOPS)
def test_whoever_stops_is_named_wherever_it_is(kind: str) -> None:
    for victim, place in _places(kind):
        stands = {stand.rank: stand for stand in _play(kind, victim, 1, place, 100 * victim + place)}
        verdict = diagnose(stands, PLACES)
        assert verdict is not None
        assert (verdict.kind, verdict.ranks) == (STOPS[kind], (victim,)), (victim, place, verdict)
        assert ranks_words([victim]) in verdict.line


def test_a_call_that_is_left_out_or_too_much_is_told_from_the_peers() -> None:
    for kind, said in (("skip", "skipped collective"), ("receive", "receive without send")):
        for victim, place in _places(kind):
            if kind == "skip" and _program(victim)[place].kind in ("send", "receive"):
                continue
            stands = {stand.rank: stand for stand in _play(kind, victim, 2, place, 7 * victim + place)}
            verdict = diagnose(stands, PLACES)
            assert verdict is not None, (kind, victim, place)
            assert (verdict.kind, verdict.ranks) == (said, (victim,)), (kind, victim, place, verdict)


def test_another_size_is_told_from_the_peers() -> None:
    for victim, place in _places("size"):
        step = _program(victim)[place]
        if step.kind in ("send", "receive"):
            continue
        played = _play("size", victim, 1, place, victim)
        # Where memory is shared, whoever reads the wrong size gives up.
        gave_up = next(r for r in _members(victim, step.axis) if r != victim)
        stands = {stand.rank: stand for stand in played}
        stands[gave_up] = replace(stands[gave_up], condition=Condition.LOST)
        verdict = diagnose(stands, PLACES, impatient=True)
        assert verdict is not None
        assert (verdict.kind, verdict.ranks) == ("other size", (victim,)), (victim, place, verdict)


@pytest.mark.parametrize(("kind", "said"), [("send", "other size"), ("receive", "receive without send")])
def test_of_a_transfer_whose_ends_differ_the_one_is_named_that_was_otherwise_before(kind: str, said: str) -> None:
    for victim, place in ((v, p) for v in range(WORLD) for p, call in enumerate(_program(v)) if call.kind == kind):
        stands = {stand.rank: stand for stand in _play("size", victim, 1, place, victim)}
        gave_up = victim if kind == "receive" else victim ^ (TP * DP)  # whoever reads
        stands[gave_up] = replace(stands[gave_up], condition=Condition.LOST)
        stands = {rank: replace(stand, late=False) for rank, stand in stands.items()}
        verdict = diagnose(stands, PLACES)
        assert verdict is not None
        assert (verdict.kind, verdict.ranks) == (said, (victim,)), (victim, place, verdict)


def test_ranks_that_wait_for_one_that_may_take_its_time_are_not_hung() -> None:
    stands = {stand.rank: stand for stand in _play("hang", 3, 1, 4, 0)}
    stands[3] = replace(stands[3], phase="save", late=False)
    assert diagnose(stands, PLACES) is None
    assert diagnose({rank: replace(stand, late=False) for rank, stand in stands.items()}, PLACES) is None


def test_of_unknown_ranks_nothing_is_said() -> None:
    stands = {stand.rank: stand for stand in _play("hang", 5, 1, 2, 0) if stand.rank < 4}
    assert diagnose(stands, PLACES) is None


def test_a_writer_that_is_stuck_is_named_and_not_those_that_wait_for_it() -> None:
    stands = {
        r: Stand(r, phase="save", late=True, writer_s=5.0, writer_stage=3, writer_waits=True) for r in range(WORLD)
    }
    stands[6] = replace(stands[6], writer_stage=2, writer_waits=False)
    verdict = diagnose(stands, PLACES)
    assert verdict is not None and (verdict.kind, verdict.ranks) == ("checkpoint", (6,))
    assert diagnose({r: replace(stand, late=False) for r, stand in stands.items()}, PLACES) is None


def test_a_rank_waits_for_whoever_has_not_come() -> None:
    stands = {stand.rank: stand for stand in _play("hang", 1, 0, 0, 0)}
    assert waits_for_ranks(stands[0], stands) == [1]
    assert waits_for_ranks(stands[1], stands) == []


def test_where_a_rank_stands_survives_the_way_to_another_node() -> None:
    for stand in _play("skip", 2, 1, 1, 0):
        assert load_stand(json.loads(json.dumps(dump_stand(stand)))) == stand
    verdict = diagnose({stand.rank: stand for stand in _play("kill", 2, 1, 1, 0)}, PLACES)
    assert verdict is not None and Verdict.load(json.loads(json.dumps(verdict.as_dict()))) == verdict
