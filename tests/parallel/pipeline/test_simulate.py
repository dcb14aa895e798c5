"""The simulator against timelines made by hand, closed forms and a literal second simulator."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pentad.configs.errors import UserError
from pentad.configs.tables.schedules import SCHEDULES
from pentad.parallel.pipeline.communication import data_needs
from pentad.parallel.pipeline.kind import Role
from pentad.parallel.pipeline.lower import lower
from pentad.parallel.pipeline.needs import Kinds
from pentad.parallel.pipeline.program import Op, Program, update
from pentad.parallel.pipeline.schedules import generate
from pentad.parallel.pipeline.simulate import StuckError, Timeline, simulate
from pentad.parallel.pipeline.times import Times, by_rank
from tests.parallel.pipeline import brute


def program(microbatches: int, placement: tuple[int, ...], *ranks: str, barriers: int = 0) -> Program:
    lists = tuple(tuple(Op.parse(token) for token in ops.split()) for ops in ranks)
    return Program(microbatches, placement, lists, barriers)


def start(timeline: Timeline, rank: int, token: str) -> float:
    return timeline.spans[rank][timeline.program.ranks[rank].index(Op.parse(token))][0]


def end(timeline: Timeline, rank: int, token: str) -> float:
    return timeline.spans[rank][timeline.program.ranks[rank].index(Op.parse(token))][1]


# By hand


def test_two_ranks_by_hand() -> None:
    line = program(2, (0, 1), "F0@0 F1@0 BW0@0 BW1@0", "F0@1 BW0@1 F1@1 BW1@1")
    timeline = simulate(line, Times(forward=(1.0, 2.0), backward=(1.5, 2.0), weight=(0.5, 1.0), hop=0.25))
    assert timeline.spans[0] == ((0, 1), (1, 2), (6.5, 8.5), (11.5, 13.5))
    assert timeline.spans[1] == ((1.25, 3.25), (3.25, 6.25), (6.25, 8.25), (8.25, 11.25))
    assert timeline.makespan == 13.5


def test_split_backward_sends_before_weights() -> None:
    line = program(1, (0, 1), "F0@0 B0@0 W0@0", "F0@1 B0@1 W0@1")
    timeline = simulate(line, Times(forward=(1.0,), backward=(2.0,), weight=(4.0,), hop=0.5))
    assert timeline.spans[0] == ((0, 1), (5, 7), (7, 11))
    assert timeline.spans[1] == ((1.5, 2.5), (2.5, 4.5), (4.5, 8.5))


def test_neighbours_on_one_rank_hand_over_without_a_hop() -> None:
    line = program(1, (0, 1, 1, 0), "F0@0 F0@3 BW0@3 BW0@0", "F0@1 F0@2 BW0@2 BW0@1")
    assert simulate(line, Times(weight=(0.0,), hop=10.0)).makespan == 8 + 4 * 10


def test_two_sends_may_be_outstanding() -> None:
    """Rank 1 posts its receives late: the third send waits for the first, the fourth for the second."""
    line = program(
        4,
        (0, 1),
        "F0@0 SF0@0 F1@0 SF1@0 F2@0 SF2@0 F3@0 SF3@0",
        "RF0@1#0 F0@1 RF1@1#1 F1@1 RF2@1#2 F2@1 RF3@1#3 F3@1",
    )
    times = Times(forward=(1.0, 10.0), hop=0.5)
    timeline = simulate(line, times)
    assert [start(timeline, 1, f"F{i}@1") for i in range(4)] == [1.5, 12.0, 22.5, 33.0]
    assert [start(timeline, 0, f"SF{i}@0") for i in range(4)] == [1.0, 2.0, 3.0, 12.0]  # not 4: SF1 ends at 12
    assert end(timeline, 0, "SF3@0") == 33.0
    assert timeline.makespan == 43.0


def test_a_link_carries_one_message_at_a_time() -> None:
    line = program(3, (0, 1), "F0@0 SF0@0 F1@0 SF1@0 F2@0 SF2@0", "RF0@1#0 RF1@1#1 RF2@1#2 F0@1 F1@1 F2@1")
    timeline = simulate(line, Times(link=2.0, hop=0.5))
    assert [start(timeline, 1, f"F{i}@1") for i in range(3)] == [3.5, 5.5, 7.5]  # on the link 1-3, 3-5, 5-7
    # Latencies overlap; the third message is sent when the first arrived, at 3.5.
    assert simulate(line, Times(hop=2.5)).makespan == 7.0


def test_a_receive_posted_late_delays_its_transfer() -> None:
    early = program(1, (0, 1), "F0@0 SF0@0", "RF0@1#0 F0@1")
    late = program(1, (1, 1, 0, 1), "RF0@2#0 F0@2 SF0@2", "F0@0 F0@1 SF0@1 RF0@3#0 F0@3")
    assert simulate(early, Times(hop=3.0)).makespan == 5.0
    assert simulate(late, Times(hop=3.0)).makespan == 10.0
    late = program(2, (0, 1), "F0@0 SF0@0 F1@0 SF1@0", "RF0@1#0 F0@1 RF1@1#0 F1@1")
    # F0@1 from 4 to 9, then the receive is posted and takes another 3.
    assert simulate(late, Times(forward=(1.0, 5.0), hop=3.0)).makespan == 17.0


def test_lanes_run_one_collective_at_a_time_in_order() -> None:
    ranks = (
        "IF0 CE0 IF1 CE1 F0@0 SF0@0 F1@0 SF1@0 CX0 CX1 S0 CS0 S1 CS1",
        "IF0 CE0 IF1 CE1 RF0@1#0 RF1@1#1 F0@1 CX0 F1@1 CX1 S0 CS0 S1 CS1",
    )
    timeline = simulate(program(2, (0, 1), *ranks, barriers=1), Times(head=(0.5,), embed=(0.5,), collective=3.0))
    assert (end(timeline, 0, "CE0"), end(timeline, 0, "CE1")) == (3.5, 6.5)  # CE1 was ready at 1
    assert (start(timeline, 0, "F0@0"), start(timeline, 0, "F1@0")) == (3.5, 6.5)
    assert (end(timeline, 1, "CX0"), end(timeline, 1, "CX1")) == (10.5, 13.5)  # rank 0 joins both at 7.5
    assert [start(timeline, rank, "S1") for rank in (0, 1)] == [13.5, 13.5]
    assert (end(timeline, 0, "CS0"), end(timeline, 0, "CS1")) == (16.5, 19.5)  # CS0 was ready at 11, but behind CX1


def test_a_collective_waits_for_the_last_rank_to_join() -> None:
    line = program(1, (0, 1), "IF0 CE0 F0@0 SF0@0 CX0 S0 CS0 T0", "IF0 CE0 RF0@1#0 F0@1 CX0 S0 CS0 T0", barriers=1)
    timeline = simulate(line, Times(head=(1.0, 4.0), head_grad=(2.0,), collective=0.5))
    assert start(timeline, 1, "S0") == 3.0
    assert [start(timeline, rank, "T0") for rank in (0, 1)] == [7.5, 7.5]
    assert timeline.makespan == 9.5


def test_the_update_by_hand() -> None:
    tail = " ".join(str(op) for op in update(2))
    line = program(1, (0, 1), f"F0@0 BW0@0 {tail}", f"F0@1 BW0@1 {tail}")
    times = Times(
        backward=(1.0,), weight=(0.0,), reduce=(3.0,), norm=0.5, optimize=(1.0, 2.0), gather=(4.0, 1.0), hop=0.0
    )
    timeline = simulate(line, times)
    # Backwards end at 4 and 3, the sums at 10 and 9, and everybody knows the norm at 10.5.
    assert [end(timeline, rank, "NORM") for rank in (0, 1)] == [10.5, 10.5]
    assert timeline.spans[0][-4:] == ((10.5, 11.5), (11.5, 15.5), (11.5, 12.5), (12.5, 19.5))
    assert timeline.spans[1][-4:] == ((10.5, 12.5), (12.5, 13.5), (12.5, 14.5), (14.5, 15.5))
    assert timeline.makespan == 19.5


# Closed forms


@settings(deadline=None, max_examples=40)
@given(
    p=st.integers(1, 6),
    m=st.integers(1, 12),
    times=st.tuples(*[st.floats(0.1, 4, allow_subnormal=False)] * 3),
    hop=st.floats(0, 2, allow_subnormal=False),
)
def test_gpipe_formula(p: int, m: int, times: tuple[float, float, float], hop: float) -> None:
    forward, backward, weight = times
    timeline = simulate(
        generate("gpipe", ranks=p, microbatches=m),
        Times(forward=(forward,), backward=(backward,), weight=(weight,), hop=hop),
    )
    expected = (m + p - 1) * (forward + backward + weight) + 2 * (p - 1) * hop
    assert timeline.makespan == pytest.approx(expected, rel=1e-12)


@settings(deadline=None, max_examples=40)
@given(p=st.integers(1, 6), m=st.integers(1, 12), times=st.tuples(*[st.floats(0.1, 4, allow_subnormal=False)] * 3))
def test_1f1b_formula(p: int, m: int, times: tuple[float, float, float]) -> None:
    forward, backward, weight = times
    timeline = simulate(
        generate("1f1b", ranks=p, microbatches=m), Times(forward=(forward,), backward=(backward,), weight=(weight,))
    )
    assert timeline.makespan == pytest.approx((m + p - 1) * (forward + backward + weight), rel=1e-12)


# Against the literal simulators

duration = st.sampled_from([0.25, 0.5, 1.0, 1.25, 2.0, 3.0])  # multiples of 1/4: sums are exact in either order
latency = st.sampled_from([0.0, 0.25, 1.0, 5.0])


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Any schedule, or an order of computation that nobody would choose; with and without a balanced vocabulary."""
    p, m = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    barriers = draw(st.integers(0, 2))
    if not barriers and draw(st.booleans()):
        return generate(draw(st.sampled_from(list(SCHEDULES))), ranks=p, microbatches=m)
    placement = tuple(draw(st.permutations(list(range(p)) * draw(st.integers(1, 2)))))
    return _random_order(draw, m, placement, barriers)


def _random_order(draw: st.DrawFn, m: int, placement: tuple[int, ...], barriers: int) -> Program:
    """Plays operations whose needs were played, in a random order: so the program can run."""
    p, split = max(placement) + 1, draw(st.booleans())
    left: list[tuple[int, Op]] = []
    for stage, rank in enumerate(placement):
        kinds = (Kinds.FORWARD, Kinds.INPUT_GRAD, Kinds.WEIGHT_GRAD) if split else (Kinds.FORWARD, Kinds.BACKWARD)
        left += [(rank, Op(kind, i, stage)) for kind in kinds for i in range(m)]
    if barriers:
        kinds = (Kinds.HEAD, Kinds.HEAD_GRAD, Kinds.EMBED, Kinds.EMBED_GRAD)
        left += [(rank, Op(kind, i)) for kind in kinds for i in range(m) for rank in range(p)]
    random = draw(st.randoms(use_true_random=False))
    blank = Program(m, placement, ((),) * p, barriers)
    done: set[tuple[int, Op]] = set()
    ranks: list[list[Op]] = [[] for _ in range(p)]
    while left:
        random.shuffle(left)
        rank, op = next(each for each in left if set(data_needs(blank, each[1])) <= done)
        left.remove((rank, op))
        done.add((rank, replace(op, kind=Kinds.INPUT_GRAD) if op.kind is Kinds.BACKWARD else op))
        ranks[rank].append(op)
    return replace(blank, ranks=tuple(tuple(ops) for ops in ranks))


@st.composite
def times_of(draw: st.DrawFn, line: Program) -> Times:
    def some(count: int) -> tuple[float, ...]:
        return tuple(draw(duration) for _ in range(draw(st.sampled_from([1, count]))))

    stages, ranks = line.stages, len(line.ranks)
    return Times(
        forward=some(stages),
        backward=some(stages),
        weight=some(stages),
        head=some(ranks),
        head_grad=some(ranks),
        embed=some(ranks),
        embed_grad=some(ranks),
        hop=draw(latency),
        link=draw(latency),
        collective=draw(latency),
    )


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_compute_only_equals_the_literal_simulation(data: st.DataObject) -> None:
    line = data.draw(programs())
    times = data.draw(times_of(line))
    expected = brute.compute_only(line, times)
    assert expected is not None
    assert [list(spans) for spans in simulate(line, times).spans] == expected


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_lowered_equals_the_literal_simulation(data: st.DataObject) -> None:
    """As lowered, and with its receives moved: then a program may be stuck, for both."""
    line = data.draw(programs())
    times = data.draw(times_of(line))
    line = lower(line)
    if line.vocab_barriers and len(line.ranks) == 1:
        return  # one rank has no collectives
    if data.draw(st.booleans()):
        line = _postponed(line, data.draw(st.randoms(use_true_random=False)))
    expected = brute.Lowered(line, times).run()
    if expected is None:
        with pytest.raises(StuckError):
            simulate(line, times)
    else:
        assert [[begin for begin, _ in spans] for spans in simulate(line, times).spans] == expected


def _postponed(line: Program, random: Random) -> Program:
    """Receives move towards the end of their rank's list, never past one another."""
    ranks = []
    for ops in line.ranks:
        result: list[Op] = []
        held: list[Op] = []
        for op in ops:
            if op.kind.role is Role.RECEIVE:
                held.append(op)
                continue
            while held and (random.random() < 0.5 or any(_consumes(op, each) for each in held)):
                result.append(held.pop(0))
            result.append(op)
        ranks.append(tuple(result + held))
    return replace(line, ranks=tuple(ranks))


def _consumes(op: Op, receive: Op) -> bool:
    forward = receive.kind is Kinds.RECV_FORWARD
    kinds = (Kinds.FORWARD,) if forward else (Kinds.BACKWARD, Kinds.INPUT_GRAD)
    return op.kind in kinds and (op.index, op.stage) == (receive.index, receive.stage)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_lowered_takes_as_long_as_compute_only(data: st.DataObject) -> None:
    """Where receives are posted early enough, the two forms of a program have the same times."""
    name = data.draw(st.sampled_from(list(SCHEDULES)))
    line = generate(name, ranks=data.draw(st.integers(1, 5)), microbatches=data.draw(st.integers(1, 12)))
    times = replace(data.draw(times_of(line)), hop=data.draw(st.sampled_from([0.0, 0.25])), link=0.0)
    low = lower(line, ahead=4, times=times)
    assert _compute_spans(simulate(low, times)) == _compute_spans(simulate(line, times))


def _compute_spans(timeline: Timeline) -> list[list[tuple[float, float]]]:
    pairs = zip(timeline.program.ranks, timeline.spans, strict=True)
    return [[span for op, span in zip(ops, spans, strict=True) if op.kind.computes] for ops, spans in pairs]


# What cannot run


def test_a_cycle_names_every_rank() -> None:
    line = program(2, (0, 1), "F0@0 BW0@0 F1@0 BW1@0", "F0@1 F1@1 BW0@1 BW1@1")
    with pytest.raises(StuckError) as caught:
        simulate(line, Times())
    assert str(caught.value) == (
        "rank 0 stands at BW0@0 (operation 1) and waits for BW0@1 of rank 1; "
        "rank 1 stands at F1@1 (operation 1) and waits for F1@0 of rank 0"
    )
    assert [(each.rank, each.position, each.awaits) for each in caught.value.waiting] == [
        (0, 1, ((1, Op.parse("BW0@1")),)),
        (1, 1, ((0, Op.parse("F1@0")),)),
    ]


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (("F0@0", "RF0@1#0 F0@1"), "rank 1 stands at F0@1 (operation 1) and waits for what no rank does"),
        (("F0@0 SF0@0", "F0@1 RF0@1#0"), "rank 1 stands at F0@1 (operation 0) and waits for RF0@1#0 of rank 1"),
        (("F0@0 SF0@0", ""), "rank 0 stands at SF0@0 (operation 1) and waits for what no rank does"),
        (("SF0@0 F0@0", "RF0@1#0 F0@1"), "SF0@0 (operation 0) and waits for what this rank does not do before"),
        (("F0@1", "F0@0"), "rank 1 stands at F0@0 (operation 0) and waits for what this rank does not do before"),
        (("F0@0 F7@0", "F0@1"), "F7@0 (operation 1) and waits for what this rank does not do before"),
        (("F0@0 W0@0", "F0@1"), "W0@0 (operation 1) and waits for what this rank does not do before"),
        (("F0@0 S0", "F0@1"), "S0 (operation 1) and waits for what this rank does not do before"),
        (("F0@0 NORM OPT0", "F0@1 F0@9 NORM"), "OPT0 (operation 2) and waits for NORM of rank 1"),
    ],
)
def test_what_is_missing_is_named(ranks: tuple[str, str], message: str) -> None:
    with pytest.raises(StuckError) as caught:
        simulate(program(1, (0, 1), *ranks), Times())
    assert message in str(caught.value)


def test_a_channel_in_two_orders() -> None:
    line = program(2, (0, 1), "F0@0 SF0@0 F1@0 SF1@0", "RF1@1#0 RF0@1#1 F0@1 F1@1")
    with pytest.raises(StuckError, match=r"rank 0 sends SF0@0 to rank 1 as number 0 .* receives RF1@1#0"):
        simulate(line, Times())


def test_a_lane_in_two_orders() -> None:
    line = program(2, (0, 1), "IF0 IF1 CE0 CE1", "IF0 IF1 CE1 CE0", barriers=1)
    with pytest.raises(StuckError, match="collective number 0 of a lane is CE0 on rank 0 and CE1 on rank 1"):
        simulate(line, Times())


def test_blocked_sends_can_deadlock() -> None:
    """Each rank stands at its third send, before the receives that the other one's sends wait for."""
    zero = "F0@0 SF0@0 F1@0 SF1@0 F2@0 SF2@0 F3@0 SF3@0 F4@0 SF4@0 {} F5@0 SF5@0 {} F0@2 F1@2 F2@2 F3@2 F4@2 F5@2"
    one = "RF0@1 RF1@1 RF2@1 F0@1 F1@1 F2@1 SF0@1 SF1@1 SF2@1 RF3@1 RF4@1 RF5@1 F3@1 SF3@1 F4@1 SF4@1 F5@1 SF5@1"
    receives = " ".join(f"RF{i}@2" for i in range(6))
    assert simulate(program(6, (0, 1, 0), zero.format(receives, ""), one), Times()).makespan == 12.0
    with pytest.raises(StuckError) as caught:
        simulate(program(6, (0, 1, 0), zero.format("", receives), one), Times())
    assert str(caught.value) == (
        "rank 0 stands at SF5@0 (operation 11) and waits for RF3@1 of rank 1; "
        "rank 1 stands at SF2@1 (operation 8) and waits for RF0@2 of rank 0"
    )


# Times


def test_mistakes_in_times_are_told() -> None:
    with pytest.raises(UserError, match="hop: a duration is at least 0, got -1"):
        Times(hop=-1.0)
    with pytest.raises(UserError, match="forward: a duration is at least 0, got nan"):
        Times(forward=(1.0, float("nan")))
    with pytest.raises(UserError, match="weight: no durations"):
        Times(weight=())
    with pytest.raises(UserError, match="backward: 3 times for 2 stages: give 1, or 2"):
        simulate(generate("1f1b", ranks=2, microbatches=1), Times(backward=(1.0, 1.0, 1.0)))
    with pytest.raises(UserError, match="head: 3 times for 2 ranks: give 1, or 2"):
        simulate(generate("1f1b", ranks=2, microbatches=1), Times(head=(1.0, 1.0, 1.0)))


def test_a_rank_shares_its_time_among_its_chunks() -> None:
    assert by_rank((0, 1, 1, 0), 2, (4.0, 6.0)) == (2.0, 3.0, 3.0, 2.0)


def test_times_of_a_recorded_run_are_medians() -> None:
    spans = []
    for i, slow in enumerate((0.0, 0.0, 5.0)):
        spans += [(0, Op(Kinds.FORWARD, i, 0), 10.0 * i, 10.0 * i + 1 + slow)]
        spans += [(1, Op(Kinds.FORWARD, i, 1), 10.0 * i, 10.0 * i + 2 + slow)]
        spans += [(1, Op(Kinds.INPUT_GRAD, i, 1), 0.0, 3 + slow), (1, Op(Kinds.WEIGHT_GRAD, i, 1), 0.0, 1.5 + slow)]
        spans += [
            (0, Op(Kinds.BACKWARD, i, 0), 0.0, 4 + slow),
            (0, Op(Kinds.HEAD, i), 0.0, 0.5),
            (0, Op(Kinds.NORM), 0, 9),
        ]
    times = Times.from_spans(spans, (0, 1), hop=0.1, weight_share=0.25)
    assert (times.forward, times.backward, times.weight) == ((1.0, 2.0), (3.0, 3.0), (1.0, 1.5))
    assert (times.head, times.optimize, times.hop) == ((0.5, 0.0), (0.0, 0.0), 0.1)
    with pytest.raises(UserError, match="no forward pass of stage 1"):
        Times.from_spans(spans[:1], (0, 1))


def test_a_simulation_gives_back_its_times() -> None:
    line = generate("zb-h1", ranks=3, microbatches=5)
    times = Times(forward=(1.0, 2.0, 3.0), backward=(2.0, 2.5, 3.0), weight=(1.0, 0.5, 0.25), hop=0.5)
    ran = simulate(line, times)
    spans = [
        (rank, op, *span)
        for rank, (ops, row) in enumerate(zip(line.ranks, ran.spans, strict=True))
        for op, span in zip(ops, row, strict=True)
    ]
    again = Times.from_spans(spans, line.placement, hop=0.5)
    assert simulate(line, again).makespan == pytest.approx(ran.makespan, rel=1e-12)
