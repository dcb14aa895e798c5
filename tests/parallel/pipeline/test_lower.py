"""Lowering adds what the check demands, costs no time, and needs few buffers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pentad.configs.tables.schedules import SCHEDULES
from pentad.parallel.pipeline.check import ProgramError, check_program
from pentad.parallel.pipeline.communication import channel, counterpart, slots
from pentad.parallel.pipeline.kind import Role
from pentad.parallel.pipeline.lower import forward_only, lower
from pentad.parallel.pipeline.needs import Kinds
from pentad.parallel.pipeline.program import Op, Program, update
from pentad.parallel.pipeline.schedules import generate
from pentad.parallel.pipeline.simulate import simulate
from pentad.parallel.pipeline.times import Times
from pentad.parallel.pipeline.vocabulary import balanced


@st.composite
def compute_programs(draw: st.DrawFn) -> Program:
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    ranks, microbatches = draw(st.integers(1, 6)), draw(st.integers(1, 14))
    chunks = SCHEDULES[name].chunks or draw(st.integers(1, 3))
    barriers = draw(st.integers(0, 2)) if SCHEDULES[name].balanced else 0
    if barriers:
        return balanced(name, ranks=ranks, microbatches=microbatches, chunks=chunks, barriers=barriers)
    return generate(name, ranks=ranks, microbatches=microbatches, chunks=chunks)


def _durations(count: int) -> st.SearchStrategy[tuple[float, ...]]:
    some = st.sampled_from((0.0, 0.5, 1.0, 1.5, 2.25))
    return st.lists(some, min_size=count, max_size=count).map(tuple)


def _lists(program: Program) -> list[str]:
    return [" ".join(map(str, ops)) for ops in program.ranks]


def _kept(program: Program) -> tuple[tuple[Op, ...], ...]:
    return tuple(tuple(op for op in ops if op.kind.computes) for ops in program.ranks)


def test_a_lowered_program() -> None:
    program = generate("1f1b", ranks=2, microbatches=3, chunks=1)
    assert _lists(lower(program)) == [
        "F0@0 SF0@0 RB0@0#0 F1@0 SF1@0 BW0@0 RB1@0#0 F2@0 SF2@0 RB2@0#1 BW1@0 BW2@0",
        "RF0@1#0 F0@1 RF1@1#1 BW0@1 SB0@1 F1@1 RF2@1#0 BW1@1 SB1@1 F2@1 BW2@1 SB2@1",
    ]
    assert _lists(lower(balanced("1f1b", ranks=2, microbatches=1, barriers=2))) == [
        "CX0 IF0 CE0 F0@0 SF0@0 S0 CS0 RB0@0#0 T0 CD0 BW0@0 CG0 IB0",
        "RF0@1#0 IF0 CE0 CG0 F0@1 CX0 S0 CS0 T0 CD0 BW0@1 SB0@1 IB0",
    ]


@settings(max_examples=120, deadline=None)
@given(compute_programs(), st.integers(0, 3), st.data())
def test_every_program_checks_clean_and_loses_no_time(program: Program, ahead: int, data: st.DataObject) -> None:
    times = Times(
        forward=data.draw(_durations(program.stages)),
        backward=data.draw(_durations(program.stages)),
        weight=data.draw(_durations(program.stages)),
        head=data.draw(_durations(1)),
        head_grad=data.draw(_durations(1)),
        embed=data.draw(_durations(1)),
        embed_grad=data.draw(_durations(1)),
        hop=data.draw(st.sampled_from((0.0, 0.1, 0.7))),
    )
    lowered = lower(program, ahead=ahead, times=times)
    check_program(lowered)
    assert _kept(lowered) == program.ranks
    assert simulate(lowered, times).makespan == pytest.approx(simulate(program, times).makespan, rel=1e-12)
    # Orders made for some times are correct at all times.
    simulate(lowered, Times(hop=3.0, collective=5.0))


@pytest.mark.parametrize("name", [name for name, schedule in SCHEDULES.items() if schedule.balanced])
@pytest.mark.parametrize("barriers", [1, 2])
def test_collectives_with_latency_are_joined_in_time(name: str, barriers: int) -> None:
    """The lanes run one collective after the other: at most 0.5 % more time than if they all ran at once."""
    chunks = SCHEDULES[name].chunks or 2
    part = (1 / chunks,)
    times = Times(
        forward=part, backward=part, weight=part, head=(0.3,), head_grad=(0.2,), embed=(0.02,), embed_grad=(0.02,),
        hop=0.1, collective=0.1,
    )  # fmt: skip
    program = balanced(name, ranks=4, microbatches=12, chunks=chunks, barriers=barriers, times=times)
    lowered = lower(program, times=times)
    assert simulate(lowered, times).makespan <= 1.005 * simulate(program, times).makespan
    for lane in ("head", "embed"):
        orders = {tuple(op for op in ops if op.kind.lane == lane) for ops in lowered.ranks}
        assert len(orders) == 1
    count = Counter(op.kind for op in lowered.ranks[0])
    assert [count[kind] for kind in (Kinds.HIDDEN, Kinds.STATISTICS, Kinds.EMBEDDED, Kinds.EMBEDDED_GRAD)] == [12] * 4
    assert count[Kinds.HIDDEN_GRAD] == 12 * (barriers == 2)


def test_lanes_find_one_order_where_ranks_pass_in_different_ones() -> None:
    program = balanced("1f1b", ranks=3, microbatches=4)
    ops = list(program.ranks[1])
    a, b = ops.index(Op(Kinds.EMBED, 0)), ops.index(Op(Kinds.EMBED, 1))
    ops[a], ops[b] = ops[b], ops[a]
    program = replace(program, ranks=(program.ranks[0], tuple(ops), program.ranks[2]))
    check_program(lower(program))


@pytest.mark.parametrize("microbatches", [16, 64])
def test_buffers_of_1f1b_do_not_grow_with_microbatches(microbatches: int) -> None:
    """As many inputs as activations and one that is on its way; of gradients one in use and one on its way."""
    p = 4
    count = slots(lower(generate("1f1b", ranks=p, microbatches=microbatches, chunks=1)))
    expected = {(r, r, Kinds.RECV_FORWARD): p - r + 1 for r in range(1, p)}
    expected |= {(r, r, Kinds.RECV_BACKWARD): 2 for r in range(p - 1)}
    assert count == expected


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "gpipe"])
def test_buffers_do_not_grow_with_microbatches_however_slow_a_stage_is(name: str) -> None:
    chunks = SCHEDULES[name].chunks or 2
    stages = 4 * chunks
    times = Times(forward=(0.1,) * (stages - 1) + (3.0,), hop=0.2)
    few, many = (slots(lower(generate(name, ranks=4, microbatches=m, chunks=chunks), times=times)) for m in (24, 48))
    assert max(few.values()) <= 2 * 4 + 1
    assert few == many


def test_how_far_ahead_receives_are_posted() -> None:
    program = generate("gpipe", ranks=2, microbatches=4, chunks=1)
    slow = Times(forward=(9.0, 1.0))  # the receiver is always there before the sender
    for ahead, first in [
        (0, "RF0@1#0 F0@1 RF1@1#1 F1@1 RF2@1#2 F2@1 RF3@1#3 F3@1"),
        (1, "RF0@1#0 RF1@1#1 F0@1 RF2@1#2 F1@1 RF3@1#3 F2@1 F3@1"),
        (2, "RF0@1#0 RF1@1#1 RF2@1#2 F0@1 RF3@1#3 F1@1 F2@1 F3@1"),
    ]:
        assert _lists(lower(program, ahead=ahead, times=slow))[1].startswith(first)
    with pytest.raises(ValueError, match="ahead is -1"):
        lower(program, ahead=-1)


def test_a_fast_sender_never_waits_for_its_receiver() -> None:
    program = generate("gpipe", ranks=2, microbatches=8, chunks=1)
    times = Times(forward=(1.0, 5.0))
    timeline = simulate(lower(program, times=times), times)
    starts = [
        s for (s, _), op in zip(timeline.spans[0], timeline.program.ranks[0], strict=True) if op.kind.role is Role.SEND
    ]
    assert starts == [1, 2, 3, 4, 5, 6, 7, 8]


def test_receives_are_in_time_for_senders_that_would_wait_for_ever() -> None:
    """Rank 0 runs all forward passes first, rank 1 answers each at once; times that are all 0 give no hint."""
    first = [Op(Kinds.FORWARD, i, 0) for i in range(6)] + [Op(Kinds.BACKWARD, i, 0) for i in range(6)]
    second = [op for i in range(6) for op in (Op(Kinds.FORWARD, i, 1), Op(Kinds.BACKWARD, i, 1))]
    program = Program(6, (0, 1), (tuple(first), tuple(second)))
    zero = Times(forward=(0.0,), backward=(0.0,), weight=(0.0,))
    check_program(lower(program, ahead=0, times=zero))


def test_nothing_to_add() -> None:
    for program in (generate("gis", ranks=1, microbatches=4, chunks=2), balanced("1f1b", ranks=1, microbatches=3)):
        assert lower(program) is program
        check_program(program)
    local = lower(generate("zb-v", ranks=3, microbatches=5, chunks=2))
    assert not any(op.stage == 3 and op.kind is Kinds.RECV_FORWARD for op in local.ranks[2])  # stages 2 and 3 share it


def test_the_update_stays_at_the_end() -> None:
    program = generate("1f1b", ranks=2, microbatches=3, chunks=1)
    tailed = replace(program, ranks=tuple(ops + update(rank + 1) for rank, ops in enumerate(program.ranks)))
    lowered = lower(tailed)
    check_program(lowered)
    assert _lists(lowered)[0].endswith("BW2@0 RG0 NORM OPT0 AG0")
    assert [len(ops) for ops in lowered.ranks] == [len(ops) + n for ops, n in zip(lower(program).ranks, (4, 7))]  # noqa: B905


def test_refuses_what_it_cannot_lower() -> None:
    program = generate("1f1b", ranks=2, microbatches=3, chunks=1)
    with pytest.raises(ValueError, match="lowered already"):
        lower(lower(program))
    with pytest.raises(ProgramError, match="F0@0 is listed 0 times"):
        lower(replace(program, ranks=(program.ranks[0][1:], program.ranks[1])))
    ops = list(program.ranks[0])
    stuck = replace(program, ranks=((ops[0], ops[2], ops[1], *ops[3:]), tuple(reversed(program.ranks[1]))))
    with pytest.raises(ProgramError):
        lower(stuck)


def test_channels() -> None:
    program = generate("interleaved", ranks=2, microbatches=2, chunks=2)  # stages 0 to 3 on ranks 0, 1, 0, 1
    assert channel(Op(Kinds.SEND_FORWARD, 0, 1), 1, program) == (1, 0)
    assert channel(Op(Kinds.RECV_FORWARD, 0, 2), 0, program) == (1, 0)
    assert channel(Op(Kinds.SEND_BACKWARD, 0, 1), 1, program) == (1, 0)
    assert channel(Op(Kinds.RECV_BACKWARD, 0, 0), 0, program) == (1, 0)
    for bad in (Op(Kinds.SEND_FORWARD, 0, 3), Op(Kinds.RECV_FORWARD, 0, 0), Op(Kinds.FORWARD, 0, 1)):
        with pytest.raises(ValueError, match="uses no channel"):
            channel(bad, 1, program)
    for ops in lower(program).ranks:
        for op in ops:
            if op.kind.transfers:
                assert counterpart(counterpart(op)) == replace(op, slot=-1)
    with pytest.raises(ValueError, match="neither"):
        counterpart(Op(Kinds.HEAD, 0))


PLACEMENTS = {"straight": (0, 1, 2, 3), "chunks": (0, 1, 2, 3) * 2, "vee": (0, 1, 2, 3, 3, 2, 1, 0), "one": (0, 0)}


def test_an_evaluation() -> None:
    assert _lists(forward_only((0, 1), 3)) == ["F0@0 F1@0 F2@0", "F0@1 F1@1 F2@1"]
    assert _lists(forward_only((0, 1), 3, 1)) == [
        "IF0 IF1 F0@0 IF2 F1@0 F2@0 S0 S1 S2",
        "IF0 IF1 IF2 F0@1 F1@1 S0 F2@1 S1 S2",
    ]
    assert forward_only((0, 1), 0).ranks == ((), ())
    with_lanes = _lists(lower(forward_only((0, 1), 1, 2)))
    assert with_lanes == ["CX0 IF0 CE0 F0@0 SF0@0 S0 CS0", "RF0@1#0 IF0 CE0 F0@1 CX0 S0 CS0"]


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
@pytest.mark.parametrize("barriers", [0, 1, 2])
def test_evaluations_fill_the_ranks_and_few_buffers(placement: tuple[int, ...], barriers: int) -> None:
    ranks = max(placement) + 1
    ideal = len(placement) // ranks * 40 + ranks - 1
    for m in (1, 2, 5, 40):
        program = lower(forward_only(placement, m, barriers))
        check_program(program)
    assert simulate(program, Times()).makespan <= ideal + ranks
    latency = Times(head=(0.3,), embed=(0.02,), hop=0.1, collective=0.1)
    work = ideal + 40 * 0.32 * (barriers > 0)
    assert simulate(program, latency).makespan <= work + 2 * ranks
    slow = Times(forward=(1.0,) * (len(placement) - 1) + (5.0,))
    for m in (40, 80):
        # The senders in front of a slow stage wait: buffers stay as they are, whatever the times and microbatches.
        buffers = slots(lower(forward_only(placement, m, barriers), times=slow))
        assert all(count <= ranks + 1 for count in buffers.values()), buffers
    if barriers:
        for ops in program.ranks:
            ahead = peak = 0
            for op in ops:
                ahead += (op.kind is Kinds.HIDDEN) - (op.kind is Kinds.HEAD)
                peak = max(peak, ahead)
            assert peak <= 3
