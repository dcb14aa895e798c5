"""What is read from a timeline: rates, causes of the bubble, the critical path, and memory."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pentad.configs.errors import UserError
from pentad.parallel.pipeline.lower import forward_only, lower
from pentad.parallel.pipeline.memory import ActivationBytes, activation_curve, byte_curve, peak_activations, peak_bytes
from pentad.parallel.pipeline.needs import Kinds
from pentad.parallel.pipeline.program import Op, update
from pentad.parallel.pipeline.readings import Bubble, Edge, bubbles, critical_path, utilization
from pentad.parallel.pipeline.schedules import generate
from pentad.parallel.pipeline.simulate import Timeline, simulate
from pentad.parallel.pipeline.times import Times
from tests.parallel.pipeline.test_simulate import program, programs, times_of

HAND = ("F0@0 F1@0 BW0@0 BW1@0", "F0@1 BW0@1 F1@1 BW1@1")
HAND_TIMES = Times(forward=(1.0, 2.0), backward=(1.5, 2.0), weight=(0.5, 1.0), hop=0.25)


def hand() -> Timeline:
    """Rank 0: 0-2, 6.5-8.5, 11.5-13.5. Rank 1: 1.25-11.25 without a gap."""
    return simulate(program(2, (0, 1), *HAND), HAND_TIMES)


def test_utilization_by_hand() -> None:
    read = utilization(hand())
    assert read.makespan == 13.5
    assert (read.span, read.work, read.idle) == ((13.5, 10.0), (6.0, 10.0), (7.5, 0.0))
    assert read.longest == 0
    assert read.bubble_rate == pytest.approx(7.5 / 13.5)
    assert read.bubble_rate_makespan == pytest.approx(7.5 / 13.5)


def test_a_staggered_timeline_has_two_bubble_rates() -> None:
    """ZB-H2 at equal times: no bubble inside any rank, and (p − 1) forward passes of stagger."""
    read = utilization(simulate(generate("zb-h2", ranks=4, microbatches=12), Times()))
    assert read.bubble_rate == pytest.approx(0, abs=1e-12)
    assert read.bubble_rate_makespan == pytest.approx(3 / (3 * 12 + 3))


def test_causes_by_hand() -> None:
    zero, one = bubbles(hand())
    # Rank 0 waits from 2 to 6.25 for BW0@1 and 0.25 for its hop, then from 8.5 to 11.25 for BW1@1, and 0.25.
    assert zero == Bubble(dependency=4.25 + 2.75, communication=0.5)
    assert one == Bubble(warm_up=1.25, tail=13.5 - 11.25)
    assert (one.idle, zero.idle, zero.total) == (0.0, 7.5, 7.5)


def test_waiting_for_the_vocabulary_is_a_barrier() -> None:
    line = program(1, (0, 1), "IF0 F0@0 S0 T0 BW0@0", "IF0 F0@1 S0 T0 BW0@1", barriers=2)
    times = Times(head=(1.0, 3.0), head_grad=(1.0, 2.0), embed=(0.5, 1.0), collective=0.25, hop=0.125)
    zero, one = bubbles(simulate(line, times))
    # F0@0 waits 0.75 for IF0 of rank 1; S0 1.375 for CX0; T0 2.25; BW0@0 for BW0@1, which waits 0.25 for the last T.
    assert zero == Bubble(barrier=0.75 + 1.375 + 2.25, dependency=1.0 + 0.25 + 2.0, communication=0.125)
    assert one == Bubble(barrier=0.25 * 3, dependency=0.75 - 0.5 + 1.0, communication=0.125, tail=2.125)


def test_a_full_channel_is_a_queue() -> None:
    ranks = (
        "F0@0 SF0@0 F1@0 SF1@0 F2@0 SF2@0 F3@0 SF3@0 F4@0 SF4@0",
        "RF0@1#0 F0@1 RF1@1#1 F1@1 RF2@1#2 F2@1 RF3@1#3 F3@1 RF4@1#4 F4@1",
    )
    line = program(5, (0, 1), *ranks)
    zero, one = bubbles(simulate(line, Times(forward=(1.0, 10.0), hop=0.5)))
    # SF3@0 waits from 4 to 12 for SF1@0 to be received.
    assert zero == Bubble(queue=8.0, tail=53.5 - 13.0)
    assert one == Bubble(warm_up=1.5, communication=4 * 0.5)


def test_reductions_between_computations_are_update() -> None:
    line = program(1, (0, 0), "F0@0 F0@1 BW0@1 RG1 BW0@0 RG0 NORM OPT0 AG0 OPT1 AG1")
    times = Times(reduce=(3.0,), norm=1.0, optimize=(2.0,), gather=(0.5,))
    (only,) = bubbles(simulate(line, times))
    assert only == Bubble(update=3.0, tail=3.0 + 1.0 + 4.0 + 0.5)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_causes_sum_to_the_bubble_and_the_path_to_the_makespan(data: st.DataObject) -> None:
    line = data.draw(programs())
    times = data.draw(times_of(line))
    if data.draw(st.booleans()):
        line = lower(line)
    timeline = simulate(line, times)
    read = utilization(timeline)
    for rank, bubble in enumerate(bubbles(timeline)):
        assert bubble.total == timeline.makespan - read.work[rank]
        assert bubble.idle == read.idle[rank]
        assert bubble.overhead == 0.0 and bubble.update == 0.0
    check_path(timeline)


def check_path(timeline: Timeline) -> None:
    """The steps follow each other from 0 to the makespan with only latencies of the times in between."""
    path, times = critical_path(timeline), timeline.times
    assert path[0].edge == Edge.START and path[0].start == 0.0
    assert path[-1].end == timeline.makespan
    for before, step in pairwise(path):
        lag = step.start - before.end
        remote = before.rank != step.rank
        match step.edge:
            case Edge.ORDER:
                assert not remote and lag == 0 and before.position < step.position
            case Edge.TRANSFER:
                lowered = before.op.kind.started
                assert lag == (0.0 if lowered or not remote else times.hop + times.link)
            case Edge.COLLECTIVE:
                assert lag == (0.0 if before.op.kind.started else times.collective)
            case Edge.QUEUE | Edge.LANE:
                assert lag == 0.0
            case Edge.START:
                raise AssertionError("two steps are the first")
    assert all(step.op == timeline.program.ranks[step.rank][step.position] for step in path)


def test_critical_path_by_hand() -> None:
    steps = [(step.rank, str(step.op), str(step.edge)) for step in critical_path(hand())]
    assert steps == [
        (0, "F0@0", "start"),
        (1, "F0@1", "transfer"),
        (1, "BW0@1", "order"),
        (1, "F1@1", "order"),
        (1, "BW1@1", "order"),
        (0, "BW1@0", "transfer"),
    ]


def test_critical_path_through_the_update() -> None:
    tail = " ".join(str(op) for op in update(2))
    line = program(1, (0, 1), f"F0@0 BW0@0 {tail}", f"F0@1 BW0@1 {tail}")
    times = Times(reduce=(1.0, 5.0), norm=0.5, optimize=(1.0,), gather=(4.0, 1.0))
    timeline = simulate(line, times)
    check_path(timeline)
    steps = [(step.rank, str(step.op)) for step in critical_path(timeline)]
    assert steps[-6:] == [(1, "RG0"), (1, "RG1"), (1, "NORM"), (0, "OPT0"), (0, "AG0"), (0, "AG1")]


def test_an_empty_timeline_reads_as_nothing() -> None:
    timeline = simulate(program(0, (0, 1), "", ""), Times())
    assert timeline.makespan == 0.0 and critical_path(timeline) == ()
    assert utilization(timeline).bubble_rate == 0.0
    assert bubbles(timeline) == (Bubble(), Bubble())


def test_a_recorded_timeline_has_overhead() -> None:
    """What neither the order nor the times explain is overhead, and the parts sum up all the same."""
    line = program(2, (0, 1), *HAND)
    late = tuple(tuple((start + 0.5 * k, end + 0.5 * k) for k, (start, end) in enumerate(row)) for row in hand().spans)
    zero, one = bubbles(Timeline(line, late, HAND_TIMES))
    assert zero.overhead > 0 and zero.total == pytest.approx(late[0][-1][1] - 6.0)
    assert one.overhead == 1.5 and one.idle == 1.5
    assert critical_path(Timeline(line, late, HAND_TIMES))[-1].end == late[0][-1][1]


# Memory


@settings(deadline=None, max_examples=60)
@given(p=st.integers(1, 8), m=st.integers(1, 24))
def test_peak_activations_of_published_schedules(p: int, m: int) -> None:
    assert peak_activations(generate("gpipe", ranks=p, microbatches=m)) == (m,) * p
    assert peak_activations(generate("1f1b", ranks=p, microbatches=m)) == tuple(min(p - r, m) for r in range(p))
    if m >= 2 * p:
        assert peak_activations(generate("zb-h1", ranks=p, microbatches=m)) == (p,) * p


def test_a_chunk_is_a_part_of_a_ranks_share() -> None:
    p, m, v = 4, 16, 2
    peaks = peak_activations(generate("interleaved", ranks=p, microbatches=m, chunks=v))
    assert peaks[0] == ((v - 1) * p + 2 * (p - 1) + 1) / v


def test_a_deferred_weight_gradient_keeps_its_activation() -> None:
    line = program(2, (0,), "F0@0 B0@0 F1@0 B1@0 W0@0 W1@0")
    assert peak_activations(line) == (2.0,)
    assert peak_activations(program(2, (0,), "F0@0 B0@0 W0@0 F1@0 B1@0 W1@0")) == (1.0,)
    (curve,) = activation_curve(simulate(line, Times()))
    assert curve == ((0.0, 1.0), (2.0, 2.0), (5.0, 1.0), (6.0, 0.0))
    sizes = ActivationBytes(activation=(10.0,), deferred=(4.0,), constant=(100.0,))
    assert peak_bytes(line, sizes) == (114.0,)
    (curve,) = byte_curve(simulate(line, Times()), sizes)
    assert curve == ((0, 100), (0, 110), (2, 104), (2, 114), (4, 108), (5, 104), (6, 100))


def test_an_evaluation_keeps_nothing() -> None:
    line = forward_only((0, 1, 0, 1), 6)
    assert peak_activations(line) == (0.5, 0.5)
    assert peak_bytes(line, ActivationBytes(activation=(1.0, 2.0, 3.0, 4.0))) == (3.0, 4.0)


def test_the_heads_part_is_held_from_s_to_t() -> None:
    line = program(2, (0, 1), "IF0 IF1 F0@0 F1@0 S0 S1 T0 T1 BW0@0 BW1@0", "IF0 IF1 F0@1 F1@1 S0 T0 S1 T1 BW0@1 BW1@1")
    line = program(2, (0, 1), *(" ".join(map(str, ops)) for ops in line.ranks), barriers=1)
    sizes = ActivationBytes(activation=(10.0, 20.0), head=(3.0, 5.0))
    assert peak_bytes(line, sizes) == (26.0, 45.0)
    with pytest.raises(UserError, match="activation: 3 times for 2 stages"):
        peak_bytes(line, ActivationBytes(activation=(1.0, 2.0, 3.0)))


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_curves_peak_at_the_peak_and_end_empty(data: st.DataObject) -> None:
    line = data.draw(programs())
    timeline = simulate(line, data.draw(times_of(line)))
    for peak, curve in zip(peak_activations(line), activation_curve(timeline), strict=True):
        assert max(held for _, held in curve) == peak and curve[-1][1] == 0.0
        assert [when for when, _ in curve] == sorted(when for when, _ in curve)
    # By counting who is alive at each moment instead of adding up.
    for rank, ops in enumerate(line.ranks):
        lives = _lives(ops, timeline.spans[rank])
        alive = max(sum(start <= when < end for start, end in lives) for when, _ in lives)
        assert alive / line.chunks == peak_activations(line)[rank]


def _lives(ops: tuple[Op, ...], spans: tuple[tuple[float, float], ...]) -> list[tuple[float, float]]:
    begun, lives = {}, []
    for op, (start, end) in zip(ops, spans, strict=True):
        if op.kind is Kinds.FORWARD:
            begun[op.index, op.stage] = start
        elif op.kind in (Kinds.BACKWARD, Kinds.WEIGHT_GRAD):
            lives.append((begun[op.index, op.stage], end))
        assert op.kind.computes
    return lives
