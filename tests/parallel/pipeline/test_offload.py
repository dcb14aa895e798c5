"""Activations on the host: where the operations stand, what is kept on the device, and what the copies cost."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from pentad.parallel.pipeline.check import ProgramError, check_program
from pentad.parallel.pipeline.communication import is_lowered
from pentad.parallel.pipeline.kind import Role
from pentad.parallel.pipeline.lower import lower
from pentad.parallel.pipeline.memory import ActivationBytes, peak_activations, peak_bytes, peak_host_bytes
from pentad.parallel.pipeline.needs import Kinds
from pentad.parallel.pipeline.offload import Pass, first_chunks, offload, selective, windows, worthwhile
from pentad.parallel.pipeline.program import Op, Program, update
from pentad.parallel.pipeline.readings import Edge, bubbles, critical_path, utilization
from pentad.parallel.pipeline.refine import refine
from pentad.parallel.pipeline.schedules import SCHEDULES, generate
from pentad.parallel.pipeline.simulate import simulate
from pentad.parallel.pipeline.times import Times
from pentad.parallel.pipeline.vocabulary import balanced
from tests.parallel.pipeline.brute import Lowered

UNITS = Times()


def _uniform(ranks: int, chunks: int, microbatches: int) -> Program:
    return generate("po-h", ranks=ranks, microbatches=microbatches, chunks=chunks)


def test_offloading_the_first_half_of_the_chunks_keeps_the_published_number_of_activations() -> None:
    for chunks, kept in ((2, 2), (3, 2), (4, 3), (8, 5), (16, 9)):
        program = lower(_uniform(4, chunks, 24))
        away = first_chunks(program, SCHEDULES["po-h"].offloads)
        assert {stage // 4 for stage, _ in away} == set(range(-(-chunks // 2)))
        done = offload(program, away, UNITS)
        # Of those that are offloaded, each is here for its passes alone: one in its forward, one in its backward pass.
        assert kept <= max(peak_activations(done)) * chunks <= kept + 2
        assert max(peak_activations(offload(program, first_chunks(program, 1.0), UNITS))) * chunks <= 2


def _everything(program: Program, times: Times = UNITS) -> list[Pass]:
    return [window.pass_ for mine in windows(program, times) for window in mine]


def _kept(program: Program, stages: range) -> int:
    """The most activations of some stages that a rank holds, counted in its list."""
    peaks = []
    for ops in program.ranks:
        held = peak = 0
        for op in ops:
            if op.stage in stages:
                held += {"F": 1, "W": -1, "BW": -1}.get(op.kind.token, 0)
                peak = max(peak, held)
        peaks.append(peak)
    return max(peaks)


# PipeOffload (Wan et al., 2025), four ranks: bubble and peak of the uniform schedule, peak of what po-h keeps.
@pytest.mark.parametrize(
    ("chunks", "bubble", "peak", "kept"), [(2, 9, 7, 2), (3, 14, 8, 2), (4, 18, 11, 3), (8, 35, 19, 5), (16, 70, 35, 9)]
)
def test_the_uniform_schedule_has_its_published_bubble_and_peaks(
    chunks: int, bubble: int, peak: int, kept: int
) -> None:
    program = _uniform(4, chunks, 24)
    check_program(program)
    assert simulate(program, UNITS).makespan - 3 * chunks * 24 == bubble
    assert max(peak_activations(program)) * chunks == peak
    assert _kept(program, range(4 * -(-chunks // 2), 4 * chunks)) == kept


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 7, 8, 12])
def test_the_uniform_schedule_gives_every_pass_a_slot_of_its_own(ranks: int) -> None:
    for chunks in (1, 2, 3, 4, 5, 6, 8):
        for microbatches in (1, 2, ranks, 11):
            program = _uniform(ranks, chunks, microbatches)
            check_program(program)
            assert all(len(ops) == 3 * chunks * microbatches for ops in program.ranks)


def _random_program(rng: random.Random) -> tuple[Program, Times]:
    name = rng.choice([*SCHEDULES, "uniform", "balanced"])
    ranks, microbatches = rng.choice((1, 2, 3, 4)), rng.randint(1, 8)
    if name == "uniform":
        program = _uniform(ranks, rng.choice((1, 2, 3)), microbatches)
    elif name == "balanced":
        program = balanced(rng.choice(("1f1b", "gis", "v-half")), ranks=ranks, microbatches=microbatches)
    else:
        program = generate(name, ranks=ranks, microbatches=microbatches)

    def each(count: int) -> tuple[float, ...]:
        return tuple(rng.randint(1, 16) / 8 for _ in range(count))

    stages = program.stages
    times = Times(
        forward=each(stages),
        backward=each(stages),
        weight=each(stages),
        hop=rng.choice((0.0, 0.125)),
        collective=0.125,
        offload=each(stages) if rng.random() < 0.5 else (rng.choice((0.0, 0.25)),),
        reload=each(stages) if rng.random() < 0.5 else (rng.choice((0.0, 0.25)),),
        one_engine=rng.random() < 0.5,
    )
    return lower(program, times=times), times


@pytest.mark.parametrize("seed", range(60))
def test_offloaded_programs_are_correct_and_their_times_those_of_a_literal_simulation(seed: int) -> None:
    rng = random.Random(seed)
    program, times = _random_program(rng)
    chosen = [each for each in _everything(program, times) if rng.random() < 0.7]
    done = offload(program, chosen, times)
    without = tuple(tuple(op for op in ops if op.kind.role not in (Role.COPY, Role.MEMORY)) for ops in done.ranks)
    assert without == program.ranks
    assert sorted((op.stage, op.index) for ops in done.ranks for op in ops if op.kind is Kinds.RESUME) == sorted(chosen)
    assert Program.from_json(done.to_json()) == done
    planned = [[start for start, _ in spans] for spans in simulate(done, times).spans]
    if len(program.ranks) > 1:
        assert Lowered(done, times).run() == planned
    for bubble, rank in zip(bubbles(simulate(done, times)), utilization(simulate(done, times)).idle, strict=True):
        assert bubble.idle == pytest.approx(rank) and bubble.overhead == pytest.approx(0)


@pytest.mark.parametrize("one_engine", [False, True])
@pytest.mark.parametrize("name", ["1f1b", "gis", "v-half", "uniform"])
def test_what_is_worthwhile_costs_no_time_and_lowers_the_peak_by_more_than_its_share(
    name: str, one_engine: bool
) -> None:
    plain = _uniform(4, 4, 16) if name == "uniform" else generate(name, ranks=4, microbatches=16)
    part = (1 / plain.chunks,)
    copies = (0.1 / plain.chunks,)
    times = Times(
        forward=part, backward=part, weight=part, hop=0.01, offload=copies, reload=copies, one_engine=one_engine
    )
    program = lower(plain, times=times)
    chosen = worthwhile(program, times)
    done = offload(program, [each for mine in chosen for each in mine], times)
    assert simulate(done, times).makespan <= simulate(program, times).makespan * 1.005
    before, after = max(peak_activations(program)), max(peak_activations(done))
    assert after < before
    if name == "uniform":
        # Half of the activations, those of the first chunks: less than half of the peak is left.
        half = [each for mine in chosen for each in mine if each[0] < program.stages // 2]
        less = max(peak_activations(offload(program, half, times)))
        assert before - less > before * len(half) / len(_everything(program, times)), (before, less, len(half))


@pytest.mark.parametrize("name", ["1f1b", "gis", "v-half", "zb-h1", "alone"])
@pytest.mark.parametrize("copy", [0.05, 0.2, 0.5])
def test_the_selection_lowers_the_highest_peak_at_no_cost_with_no_more_copies_than_that_takes(
    name: str, copy: float
) -> None:
    if name == "alone":
        plain = refine(generate("1f1b", ranks=1, microbatches=3), (8,))
    else:
        plain = generate(name, ranks=4, microbatches=12)
    part, copies = (1 / plain.chunks,), (copy / plain.chunks,)
    times = Times(forward=part, backward=part, weight=part, hop=0.01, offload=copies, reload=copies)
    program = lower(plain, times=times)
    sizes = ActivationBytes(activation=(8.0,))
    chosen = selective(program, times, sizes)
    done = offload(program, chosen, times)
    assert simulate(done, times).makespan <= simulate(program, times).makespan * 1.005
    before, after = peak_bytes(program, sizes), peak_bytes(done, sizes)
    whole = [each for mine in worthwhile(program, times) for each in mine]
    if simulate(offload(program, whole, times), times).makespan <= simulate(program, times).makespan * 1.005:
        # As low as with all that is worthwhile, with fewer copies.
        assert max(after) == max(peak_bytes(offload(program, whole, times), sizes))
        assert len(chosen) < len(whole) or not whole
    assert max(after) < max(before) or not chosen
    for rank in range(len(program.ranks)):
        last = [each for each in chosen if program.placement[each[0]] == rank][-1:]
        if last:
            # One less, and this rank's peak would be the highest.
            less = peak_bytes(offload(program, [each for each in chosen if each not in last], times), sizes)
            assert less[rank] > max(after)


@pytest.mark.parametrize("one_engine", [False, True])
def test_copies_that_would_cost_time_are_left_out(one_engine: bool) -> None:
    """Windows are long enough for each copy, but the engine is too slow for all of them."""
    plain = refine(generate("1f1b", ranks=1, microbatches=3), (16,))
    times = Times(offload=(3.0,), reload=(3.0,), one_engine=one_engine)
    sizes = ActivationBytes(activation=(1.0,))
    slow = offload(plain, [each for mine in worthwhile(plain, times) for each in mine], times)
    before = simulate(plain, times).makespan
    assert simulate(slow, times).makespan > before * 1.1
    done = offload(plain, selective(plain, times, sizes), times)
    assert simulate(done, times).makespan <= before * 1.005
    assert peak_bytes(done, sizes)[0] <= 12 < peak_bytes(plain, sizes)[0]


def test_the_selection_goes_on_from_what_a_schedule_offloads_anyway() -> None:
    times = Times(forward=(0.25,), backward=(0.25,), weight=(0.25,), hop=0.01, offload=(0.05,), reload=(0.05,))
    program, sizes = lower(_uniform(4, 4, 12), times=times), ActivationBytes(activation=(1.0,))
    always = first_chunks(program, 0.5)
    chosen = selective(program, times, sizes, always)
    assert chosen and not set(chosen) & set(always)
    po_h, more = offload(program, always, times), offload(program, [*always, *chosen], times)
    assert max(peak_bytes(more, sizes)) < max(peak_bytes(po_h, sizes))
    assert simulate(more, times).makespan <= simulate(po_h, times).makespan * 1.005


def test_bytes_are_on_the_host_or_on_the_device() -> None:
    times = Times(offload=(0.1,), reload=(0.1,))
    program = lower(generate("1f1b", ranks=2, microbatches=4), times=times)
    sizes = ActivationBytes(activation=(100.0,), offloaded=(90.0,), constant=(1000.0,))
    assert peak_host_bytes(program, sizes) == (0.0, 0.0)
    done = offload(program, _everything(program), times)
    # Rank 0 holds two microbatches: of one in its forward or backward pass all, of the other what is not offloaded.
    assert peak_bytes(program, sizes) == (1200.0, 1100.0)
    assert max(peak_host_bytes(done, sizes)) >= 90.0
    slabs = {op.slot for ops in done.ranks for op in ops if op.kind is Kinds.OFFLOAD}
    assert max(peak_host_bytes(done, sizes)) == 90.0 * len(slabs)


def test_a_wait_for_a_copy_is_named() -> None:
    times = Times(offload=(3.0,), reload=(3.0,))
    program = generate("1f1b", ranks=1, microbatches=3)
    done = offload(program, _everything(program), times)
    timeline = simulate(done, times)
    assert bubbles(timeline)[0].offload == pytest.approx(timeline.makespan - 9.0)
    assert Edge.COPY in {step.edge for step in critical_path(timeline)}


def test_what_does_not_fit_stays() -> None:
    program = generate("1f1b", ranks=1, microbatches=3)
    assert worthwhile(program, Times(offload=(0.1,), reload=(0.1,))) == [[]]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("OFF0@0#0", "", "REL0@0 .* needs OFF0@0, which is not listed"),
        ("REL0@0", "", "OFF0@0#0 .* is not followed by REL0@0"),
        ("RES0@0", "", "RLD0@0 .* is not followed by RES0@0"),
        ("PRE0@0 RLD0@0", "RLD0@0 PRE0@0", "RLD0@0 .* comes before PRE0@0"),
        ("RES0@0 BW0@0", "BW0@0 RES0@0", "RES0@0 .* comes after BW0@0"),
        ("F0@0 OFF0@0#0", "OFF0@0#0 F0@0", "OFF0@0#0 .* comes before F0@0"),
        ("OFF1@0#1", "OFF1@0#0", "OFF1@0#0 .* overwrites slot 0, which OFF0@0 needs"),
        ("OFF0@0#0", "OFF0@0", "OFF0@0 .* has no slot"),
        ("RES0@0", "RES0@0 RES0@0", "RES0@0 is listed 2 times"),
        ("RES0@0", "RES0@1", "RES0@1 does not belong here"),
    ],
)
def test_what_is_wrong_with_an_offload_is_said(old: str, new: str, message: str) -> None:
    times = Times(offload=(0.1,), reload=(0.1,))
    program = lower(generate("gpipe", ranks=2, microbatches=3), times=times)
    program = offload(program, [(0, 0), (0, 1)], times)
    text = f" {' '.join(map(str, program.ranks[0]))} "
    assert f" {old} " in text
    edited = tuple(Op.parse(token) for token in text.replace(f" {old} ", f" {new} ").split())
    with pytest.raises(ProgramError, match=message):
        check_program(replace(program, ranks=(edited, program.ranks[1])))


def test_what_is_not_there_is_not_offloaded_and_nothing_twice() -> None:
    program = generate("1f1b", ranks=1, microbatches=2)
    with pytest.raises(ProgramError, match="no activation of microbatch 2 at stage 0"):
        offload(program, [(0, 2)], UNITS)
    done = offload(program, [(0, 1)], UNITS)
    with pytest.raises(ProgramError, match="has offloads already"):
        offload(done, [(0, 1)], UNITS)


def test_the_end_of_the_step_stays_where_it_is() -> None:
    program = lower(generate("gis", ranks=2, microbatches=4))
    whole = replace(program, ranks=tuple(ops + update(2) for ops in program.ranks))
    done = offload(whole, _everything(whole), UNITS)
    assert is_lowered(done) and all(ops[-7:] == update(2) for ops in done.ranks)
