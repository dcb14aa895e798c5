"""Vocabulary balance: complete, never stuck, no bubble beyond the schedule's own, and the activations that it costs."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pentad.configs.errors import UserError
from pentad.parallel.pipeline.needs import KINDS, Kinds
from pentad.parallel.pipeline.program import Op, Program
from pentad.parallel.pipeline.schedules import generate
from pentad.parallel.pipeline.simulate import Timeline, simulate
from pentad.parallel.pipeline.times import Times
from pentad.parallel.pipeline.vocabulary import balanced

HEAD = [(0.05, 0.1), (0.3, 0.3), (2.0, 1.0)]
"""S and T of every rank, where F of a rank's whole share is 1."""


def times_of(chunks: int, head: tuple[float, float] = (0.3, 0.3), latency: float = 0.0, embed: float = 0.0) -> Times:
    """F = B = W = 1 for a rank's whole share; the latency of a collective is a part of F of a chunk."""
    stage = (1 / chunks,)
    return Times(
        forward=stage,
        backward=stage,
        weight=stage,
        head=head[:1],
        head_grad=head[1:],
        embed=(embed,),
        embed_grad=(embed,),
        collective=latency / chunks,
    )


def vocabulary_work(times: Times, microbatches: int) -> float:
    """Of one rank, where all ranks have the same."""
    return microbatches * (times.head[0] + times.head_grad[0] + times.embed[0] + times.embed_grad[0])


def idle(timeline: Timeline) -> float:
    """The most that a rank waits between its first and its last operation."""
    return max(s[-1][1] - s[0][0] - sum(end - start for start, end in s) for s in timeline.spans)


def peaks(program: Program) -> list[int]:
    """The most chunks in flight, from F to W or BW, per rank."""
    most = []
    for ops in program.ranks:
        held, peak = 0, 0
        for op in ops:
            held += {Kinds.FORWARD: 1, Kinds.BACKWARD: -1, Kinds.WEIGHT_GRAD: -1}.get(op.kind, 0)
            peak = max(peak, held)
        most.append(peak)
    return most


@given(
    st.sampled_from([("1f1b", 1), ("v-half", 2), *((name, v) for name in ("interleaved", "gis") for v in (1, 2, 3))]),
    st.integers(1, 9),
    st.data(),
)
@settings(max_examples=120, deadline=None, derandomize=True)
def test_complete_and_never_stuck(schedule: tuple[str, int], ranks: int, data: st.DataObject) -> None:
    name, chunks = schedule
    microbatches = data.draw(st.integers(1, 2 * ranks + 3), "microbatches")
    barriers = data.draw(st.sampled_from([1, 2]), "barriers")
    duration = st.sampled_from([0.0, 0.01, 0.3, 1.0, 1.7])
    stages = ranks * chunks
    head, head_grad, embed, embed_grad = ((data.draw(duration, key),) for key in ("S", "T", "IF", "IB"))
    forward, backward, weight = (
        tuple(data.draw(st.lists(duration, min_size=stages, max_size=stages), key))
        for key in ("forward", "backward", "weight")
    )
    times = Times(
        forward=forward,
        backward=backward,
        weight=weight,
        head=head,
        head_grad=head_grad,
        embed=embed,
        embed_grad=embed_grad,
        hop=data.draw(duration, "hop"),
        collective=data.draw(duration, "collective"),
    )
    program = balanced(name, ranks=ranks, microbatches=microbatches, chunks=chunks, barriers=barriers, times=times)
    plain = generate(name, ranks=ranks, microbatches=microbatches, chunks=chunks)
    vocabulary = sorted(
        (kind.token, i) for kind in KINDS.values() if kind.computes and kind.balanced for i in range(microbatches)
    )
    sequences = set()
    for ops, before in zip(program.ranks, plain.ranks, strict=True):
        assert sorted(map(str, (op for op in ops if op.kind.of_stage))) == sorted(map(str, before))
        sequences.add(tuple(op for op in ops if op.kind.computes and op.kind.balanced))
        assert sorted((op.kind.token, op.index) for op in ops if op.kind.computes and op.kind.balanced) == vocabulary
    assert len(sequences) == 1, "collectives would run in another order on another rank"
    assert program.vocab_barriers == barriers
    assert program.placement == plain.placement
    simulate(program, times)
    simulate(program, times_of(chunks))


@pytest.mark.parametrize("barriers", [1, 2])
@pytest.mark.parametrize("ranks", [4, 8, 16])
def test_1f1b_has_its_own_bubble_and_a_microbatch_more_per_barrier(ranks: int, barriers: int) -> None:
    m = 3 * ranks
    for head in HEAD:
        times = times_of(1, head)
        program = balanced("1f1b", ranks=ranks, microbatches=m, barriers=barriers, times=times)
        timeline = simulate(program, times)
        assert timeline.makespan == pytest.approx(m * (3 + sum(head)) + (ranks - 1) * 3, rel=1e-12)
        assert idle(timeline) == pytest.approx((ranks - 1) * 3, rel=1e-12)
        assert peaks(program) == [min(ranks - r + barriers, m) for r in range(ranks)]


@pytest.mark.parametrize("name", ["interleaved", "gis"])
@pytest.mark.parametrize("barriers", [1, 2])
@pytest.mark.parametrize("chunks", [2, 4])
@pytest.mark.parametrize("ranks", [4, 8, 16])
def test_chunked_schedules_have_no_more_idle_time_for_one_more_chunk_per_barrier(
    name: str, ranks: int, chunks: int, barriers: int
) -> None:
    plain = generate(name, ranks=ranks, microbatches=2 * ranks, chunks=chunks)
    for head in HEAD:
        for embed in (0.0, 0.02):
            times = times_of(chunks, head, embed=embed)
            program = balanced(name, ranks=ranks, microbatches=2 * ranks, chunks=chunks, barriers=barriers, times=times)
            assert idle(simulate(program, times)) <= idle(simulate(plain, times)) * (1 + 1e-9)
            assert max(peaks(program)) == max(peaks(plain)) + barriers


@pytest.mark.parametrize("name", ["interleaved", "gis"])
@pytest.mark.parametrize("barriers", [1, 2])
@pytest.mark.parametrize("chunks", [2, 4])
@pytest.mark.parametrize("ranks", [4, 8, 16])
def test_the_latency_of_the_collectives_costs_a_chunk_more(name: str, ranks: int, chunks: int, barriers: int) -> None:
    """Two collectives are before the first and after the last pass of a stage: nothing can hide those."""
    plain = generate(name, ranks=ranks, microbatches=2 * ranks, chunks=chunks)
    for latency in (0.1, 0.5):
        times = times_of(chunks, latency=latency, embed=0.02)
        program = balanced(name, ranks=ranks, microbatches=2 * ranks, chunks=chunks, barriers=barriers, times=times)
        bound = idle(simulate(plain, times)) + 2 * times.collective
        assert idle(simulate(program, times)) <= bound * (1 + 1e-9)
        assert max(peaks(program)) <= max(peaks(plain)) + barriers + 1


@pytest.mark.parametrize("name", ["interleaved", "gis"])
@pytest.mark.parametrize("seed", range(12))
def test_unequal_times_cost_at_most_two_percent(name: str, seed: int) -> None:
    """Beside the same schedule with the same vocabulary work in each rank's own time."""
    draw = random.Random(seed)
    ranks, chunks, barriers = draw.choice((4, 8, 16)), draw.choice((2, 4)), draw.choice((1, 2))
    m = ranks * draw.choice((2, 4))
    forward, spread = 1 / chunks, draw.choice((0.0, 0.1))

    def stages(mean: float) -> tuple[float, ...]:
        return tuple(mean * draw.uniform(1 - spread, 1 + spread) for _ in range(ranks * chunks))

    times = Times(
        forward=stages(forward),
        backward=stages(forward * draw.uniform(0.8, 1.2)),
        weight=stages(forward * draw.uniform(0.6, 1.0)),
        head=(draw.uniform(0.05, 0.6),),
        head_grad=(draw.uniform(0.05, 0.6),),
        embed=(0.02,),
        embed_grad=(0.02,),
        hop=forward * draw.uniform(0.0, 0.1),
        collective=forward * draw.uniform(0.0, 0.5),
    )
    plain = generate(name, ranks=ranks, microbatches=m, chunks=chunks)
    program = balanced(name, ranks=ranks, microbatches=m, chunks=chunks, barriers=barriers, times=times)
    ideal = simulate(plain, times).makespan + vocabulary_work(times, m)
    assert simulate(program, times).makespan <= 1.02 * ideal
    assert max(peaks(program)) <= max(peaks(plain)) + barriers + 3
    if spread == 0.0:
        # Where the stages differ, the idlest rank is one that plain does not count to the ends of the step.
        assert idle(simulate(program, times)) - idle(simulate(plain, times)) <= 0.02 * ideal


@pytest.mark.parametrize("barriers", [1, 2])
@pytest.mark.parametrize("ranks", [2, 4, 7, 8, 16])
def test_v_half_grows_by_a_microbatch_and_three_passes_per_barrier(ranks: int, barriers: int) -> None:
    m = 3 * ranks
    plain = generate("v-half", ranks=ranks, microbatches=m)
    for head in HEAD:
        times = times_of(2, head)
        program = balanced("v-half", ranks=ranks, microbatches=m, barriers=barriers, times=times)
        bound = simulate(plain, times).makespan + vocabulary_work(times, m) + barriers * 3 * 0.5
        assert simulate(program, times).makespan <= bound * (1 + 1e-9)
        assert max(peaks(program)) == max(peaks(plain)) + 2 * barriers


@pytest.mark.parametrize(("name", "chunks"), [("1f1b", 1), ("interleaved", 2), ("gis", 4), ("v-half", 2)])
@pytest.mark.parametrize("barriers", [1, 2])
def test_embedding_passes_run_ahead_and_hold_little(name: str, chunks: int, barriers: int) -> None:
    p, m = 4, 16
    times = times_of(chunks, embed=0.02)
    program = balanced(name, ranks=p, microbatches=m, chunks=chunks, barriers=barriers, times=times)
    timeline = simulate(program, times)
    when = [dict(zip(ops, spans, strict=True)) for ops, spans in zip(program.ranks, timeline.spans, strict=True)]
    backward = Kinds.BACKWARD if Op(Kinds.BACKWARD, 0, 0) in when[0] else Kinds.INPUT_GRAD
    used = [when[0][Op(Kinds.FORWARD, i, 0)][0] for i in range(m)]
    made = [when[0][Op(Kinds.EMBED, i)][0] for i in range(m)]
    grads = [when[0][Op(backward, i, 0)][1] for i in range(m)]
    for i in range(m):
        assert all(spans[Op(Kinds.EMBED, i)][1] <= used[i] + 1e-9 for spans in when), "the first stage waited"
        assert sum(made[j] <= made[i] <= used[j] for j in range(m)) <= 3
        for spans in when:
            added = spans[Op(Kinds.EMBED_GRAD, i)][0]
            assert sum(grads[j] <= added + 1e-9 for j in range(i, m)) <= 2


def test_the_same_program_on_every_rank_and_in_every_run() -> None:
    times = times_of(2, latency=0.3, embed=0.01)
    made = {balanced("gis", ranks=4, microbatches=9, chunks=2, times=replace(times)).hash for _ in range(3)}
    assert len(made) == 1


def test_times_are_optional_and_groups_are_kept() -> None:
    for name in ("1f1b", "interleaved", "gis", "v-half"):
        simulate(balanced(name, ranks=3, microbatches=5), Times())
    program = balanced("gis", ranks=4, microbatches=8, chunks=2, group=2)
    plain = generate("gis", ranks=4, microbatches=8, chunks=2, group=2)
    assert max(peaks(program)) == max(peaks(plain)) + 1


def test_other_schedules_refuse() -> None:
    with pytest.raises(UserError, match=r"\.vocab: balanced has no passes for .*zb-h1, only for 1f1b"):
        balanced("zb-h1", ranks=4, microbatches=8)
    with pytest.raises(UserError, match=r"parallel\.pipeline\.vocab_barriers: 3 .*set 1 or 2"):
        balanced("1f1b", ranks=4, microbatches=8, barriers=3)
    with pytest.raises(UserError, match=r"parallel\.pipeline\.schedule: no schedule is called '1fb1'"):
        balanced("1fb1", ranks=4, microbatches=8)
