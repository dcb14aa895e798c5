"""Every schedule: complete and free of deadlocks for any size, with the memory and the bubble that theory gives it."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pentad.configs.errors import UserError
from pentad.configs.tables.schedules import SCHEDULES
from pentad.parallel.pipeline.kind import Kind
from pentad.parallel.pipeline.needs import KINDS, Kinds
from pentad.parallel.pipeline.program import Program
from pentad.parallel.pipeline.schedules import generate, order_of, placement
from pentad.parallel.pipeline.simulate import simulate
from pentad.parallel.pipeline.times import Times

NAMES = ("gpipe", "1f1b", "interleaved", "gis", "zb-h1", "zb-h2", "zb-v", "v-half", "v-min", "dualpipev")
OFFLOADED = ("po-h", "po-f")
"""Their orders and what they keep are in `test_offload.py`."""
ANY = settings(max_examples=60, deadline=None)
EXACT = settings(max_examples=150, deadline=None)

ranks = st.integers(1, 9)
durations = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))


def chunks_of(name: str) -> st.SearchStrategy[int]:
    fixed = SCHEDULES[name].chunks
    return st.just(fixed) if fixed else st.integers(1, 4)


def group_of(name: str, p: int) -> st.SearchStrategy[int | None]:
    match name:
        case "gis":
            return st.none() | st.integers(-(-p // 2), p)
        case "interleaved":
            return st.none() | st.integers(p, 2 * p + 1)
    return st.none()


def any_program(name: str, data: st.DataObject) -> tuple[int | None, Program]:
    """The group and the program of a size that `data` draws."""
    p = data.draw(ranks, "p")
    m, v = data.draw(st.integers(1, 3 * p + 3), "m"), data.draw(chunks_of(name), "v")
    group = data.draw(group_of(name, p), "group")
    return group, generate(name, ranks=p, microbatches=m, chunks=v, group=group)


def peaks(program: Program) -> list[int]:
    """The most activations of one chunk and microbatch that each rank holds."""
    most = []
    for ops in program.ranks:
        held, peak = 0, 0
        for op in ops:
            held += (op.kind is Kinds.FORWARD) - (op.kind in (Kinds.BACKWARD, Kinds.WEIGHT_GRAD))
            peak = max(peak, held)
        assert held == 0
        most.append(peak)
    return most


def bubbles(program: Program, f: float, b: float, w: float) -> tuple[float, float]:
    """Idle time in units of one chunk's passes: of the whole step, and inside the longest span of a rank.

    f, b and w are the times of one chunk, so a rank's work is microbatches × chunks × (f + b + w).
    """
    timeline = simulate(program, Times(forward=(f,), backward=(b,), weight=(w,)))
    work = program.microbatches * program.chunks * (f + b + w)
    return timeline.makespan - work, max(spans[-1][1] - spans[0][0] for spans in timeline.spans) - work


# Any size -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@ANY
@given(st.data())
def test_every_stage_and_microbatch_is_computed_once_where_it_belongs(name, data):
    _, program = any_program(name, data)
    want = {(i, s): program.placement[s] for s in range(program.stages) for i in range(program.microbatches)}
    count: Counter[tuple[Kind, int, int]] = Counter()
    for rank, ops in enumerate(program.ranks):
        for op in ops:
            assert op.kind in (Kinds.FORWARD, Kinds.BACKWARD, Kinds.INPUT_GRAD, Kinds.WEIGHT_GRAD)
            assert op.slot == -1 and want[op.index, op.stage] == rank
            assert SCHEDULES[name].splits or op.kind not in (Kinds.INPUT_GRAD, Kinds.WEIGHT_GRAD)
            count[op.kind, op.index, op.stage] += 1
    assert set(count.values()) == {1}
    for i, s in want:
        fused = count[Kinds.BACKWARD, i, s]
        assert count[Kinds.FORWARD, i, s] == 1
        assert count[Kinds.INPUT_GRAD, i, s] == count[Kinds.WEIGHT_GRAD, i, s] == 1 - fused


@pytest.mark.parametrize("name", NAMES)
@ANY
@given(st.data(), durations)
def test_every_program_runs_to_its_end_and_in_the_order_of_its_data(name, data, times):
    """What simulates at all never waits in a circle, whatever the operations take; and no W comes before its B."""
    _, program = any_program(name, data)
    f, b, w = times
    timeline = simulate(program, Times(forward=(f,), backward=(b,), weight=(w,), hop=0.5))
    for ops, spans in zip(program.ranks, timeline.spans, strict=True):
        place = {(op.kind, op.index, op.stage): k for k, op in enumerate(ops)}
        assert len(spans) == len(ops)
        for op in ops:
            if op.kind is Kinds.WEIGHT_GRAD:
                assert place[Kinds.INPUT_GRAD, op.index, op.stage] < place[op.kind, op.index, op.stage]
    path = program.stages * (f + b) + w
    assert timeline.makespan >= max(path, program.microbatches * program.chunks * (f + b + w))


def most_activations(name: str, p: int, m: int, v: int, group: int | None, r: int) -> int:
    """The table's memory, in activations of one chunk."""
    g = group or p
    most = {
        "gpipe": m,
        "1f1b": p - r,
        "interleaved": p - r if v == 1 else (v - 1) * g + 2 * (p - 1 - r) + 1,
        "gis": (v - 1) * g + p - r,
        "zb-h1": p,
        "zb-h2": 2 * p - 1,
        "zb-v": 2 * p,
        "v-half": 2 * (p // 2 + 1),
        "v-min": 2 * ((p + 4) // 3),
        "dualpipev": 2 * p + 1,
    }
    return min(most[name], m * v)


@pytest.mark.parametrize("name", NAMES)
@ANY
@given(st.data())
def test_no_rank_keeps_more_activations_than_the_schedule_promises(name, data):
    group, program = any_program(name, data)
    p, m = len(program.ranks), program.microbatches
    bound = [most_activations(name, p, m, program.chunks, group, r) for r in range(p)]
    assert all(has <= most for has, most in zip(peaks(program), bound, strict=True))


# Exact memory and bubble ----------------------------------------------------------------------------------------------


@EXACT
@given(st.sampled_from(("gpipe", "1f1b")), ranks, st.data(), durations)
def test_gpipe_and_1f1b_have_the_bubble_and_the_memory_of_theory(name, p, data, times):
    """Any number of microbatches, any times."""
    f, b, w = times
    m = data.draw(st.integers(1, 3 * p + 3))
    program = generate(name, ranks=p, microbatches=m)
    assert bubbles(program, f, b, w)[0] == (p - 1) * (f + b + w)
    assert peaks(program) == [most_activations(name, p, m, 1, None, r) for r in range(p)]


@EXACT
@given(ranks, st.integers(1, 4), st.integers(1, 4), durations, st.data())
def test_interleaved_divides_the_bubble_by_the_chunks(p, v, turns, times, data):
    """Any times, where whole turns of g microbatches make up the step."""
    f, b, w = times
    g = data.draw(group_of("interleaved", p))
    m = turns * (g or p)
    program = generate("interleaved", ranks=p, microbatches=m, chunks=v, group=g)
    assert bubbles(program, f, b, w)[0] == (p - 1) * (f + b + w)
    assert peaks(program) == [most_activations("interleaved", p, m, v, g, r) for r in range(p)]


@EXACT
@given(ranks, st.integers(1, 4), st.integers(1, 4), durations)
def test_gis_has_the_memory_of_1f1b_and_no_weight_gradient_in_its_bubble(p, v, turns, times):
    """Any times, where p divides the microbatches."""
    f, b, w = times
    program = generate("gis", ranks=p, microbatches=turns * p, chunks=v)
    assert bubbles(program, f, b, w)[0] == (p - 1) * (f + b)
    assert max(peaks(program)) == p * v


@EXACT
@given(ranks, st.integers(1, 4), st.integers(1, 4), durations, st.data())
def test_gis_with_smaller_groups(p, v, turns, times, data):
    """Exact at equal times for every g, and at g = p/2 for W ≤ min(F, B) as long as g microbatches outlast one
    pass through the ranks; for other g the table is an upper bound then."""
    f, b, w = times
    g = data.draw(st.integers(-(-p // 2), p))
    program = generate("gis", ranks=p, microbatches=turns * g, chunks=v, group=g)
    assert peaks(program) == [most_activations("gis", p, turns * g, v, g, r) for r in range(p)]
    assert bubbles(program, 1, 1, 1)[0] == 2 * (p - 1) + (p - g) * (v - 1)
    assume(w <= min(f, b) and g * (f + b + w) >= p * max(f, b))
    bubble, table = bubbles(program, f, b, w)[0], (p - 1) * (f + b) + (p - g) * (v - 1) * (f + b - w)
    assert bubble == table if 2 * g == p else bubble <= table


@EXACT
@given(ranks, st.data(), durations)
def test_zero_bubble_with_one_stage_per_rank(p, data, times):
    """W ≤ min(F, B); zb-h1 from p microbatches on, zb-h2 from 2p - 1 on and by the span of a rank."""
    f, b, w = times
    assume(w <= min(f, b))
    m = data.draw(st.integers(2 * p - 1, 4 * p))
    h1 = generate("zb-h1", ranks=p, microbatches=m - p + 1)
    assert bubbles(h1, f, b, w)[0] == (p - 1) * (f + b - w)
    assert peaks(h1) == [p] * p
    h2 = generate("zb-h2", ranks=p, microbatches=m)
    assert bubbles(h2, f, b, w)[1] == (p - 1) * (f + b - 2 * w)
    assert peaks(h2) == [2 * p - 1] * p


@EXACT
@given(st.integers(1, 12), st.integers(0, 9))
def test_v_schedules_at_equal_times(p, more):
    """zb-v from 2p - 1 microbatches on, dualpipev from 2p on; the bubbles in passes of one chunk.

    The pairs of dualpipev run one after the other here, which leaves half of what its authors state for fused ones.
    """
    zb_v = generate("zb-v", ranks=p, microbatches=2 * p - 1 + more)
    assert bubbles(zb_v, 1, 1, 1) == (p - 1, 0)
    assert peaks(zb_v) == [2 * p] * p
    dual = generate("dualpipev", ranks=p, microbatches=2 * p + more)
    assert bubbles(dual, 1, 1, 1) == (p - 1, p - 1)
    assert peaks(dual) == [2 * p + 1] * p


@EXACT
@given(st.integers(1, 16), st.integers(0, 9))
def test_controllable_memory_at_equal_times(p, more):
    """Peaks from p microbatches on; the bubbles as measured, of 6(p - 1) that 1f1b has in the same unit. Weight
    gradients follow in the order of their input gradients."""
    m = max(2, p) + more
    half = generate("v-half", ranks=p, microbatches=m)
    assert max(peaks(half)) == 2 * (p // 2 + 1)
    assert bubbles(half, 1, 1, 1)[0] == (3.5 * (p - 1) if p % 2 else 3.5 * p - 2)
    least = generate("v-min", ranks=p, microbatches=m)
    for ops in (*half.ranks, *least.ranks):
        by_kind = {kind: [(op.index, op.stage) for op in ops if op.kind is kind] for kind in KINDS.values()}
        assert by_kind[Kinds.WEIGHT_GRAD] == by_kind[Kinds.INPUT_GRAD]
    assert max(peaks(least)) == 2 * ((p + 4) // 3)
    assert bubbles(least, 1, 1, 1)[0] == (max(0, 4 * p - 5) if p % 3 else 4 * p - 3)


def test_interleaved_spreads_the_microbatches_that_a_last_turn_lacks():
    """With one microbatch too many for whole turns, at most twice the bubble; a last turn of one would be thrice."""
    for p, v in ((4, 2), (8, 2), (8, 4), (16, 2)):
        assert bubbles(generate("interleaved", ranks=p, microbatches=4 * p + 1, chunks=v), 1, 1, 1)[0] <= 6 * (p - 1)


def test_gis_loses_nothing_when_half_a_turn_is_left():
    for p in (4, 6, 8):
        for m in range(2 * p + p // 2, 3 * p + 1):
            program = generate("gis", ranks=p, microbatches=m, chunks=2)
            assert bubbles(program, 1, 1, 1)[0] == 2 * (p - 1)


# Text, registry and mistakes ------------------------------------------------------------------------------------------


def text(name: str, **size: int) -> list[str]:
    return [" ".join(map(str, ops)) for ops in generate(name, **size).ranks]


def test_orders_of_a_small_pipeline():
    assert text("1f1b", ranks=1, microbatches=2) == ["F0@0 BW0@0 F1@0 BW1@0"]
    assert text("1f1b", ranks=2, microbatches=2) == ["F0@0 F1@0 BW0@0 BW1@0", "F0@1 BW0@1 F1@1 BW1@1"]
    assert text("gpipe", ranks=1, microbatches=2) == ["F0@0 F1@0 BW0@0 BW1@0"]
    assert text("gis", ranks=2, microbatches=1, chunks=2) == [
        "F0@0 F0@2 B0@2 W0@2 B0@0 W0@0",
        "F0@1 F0@3 B0@3 W0@3 B0@1 W0@1",
    ]
    assert text("zb-h1", ranks=2, microbatches=2) == [
        "F0@0 F1@0 B0@0 W0@0 B1@0 W1@0",
        "F0@1 B0@1 F1@1 B1@1 W0@1 W1@1",
    ]
    assert text("v-half", ranks=1, microbatches=1) == ["F0@0 F0@1 B0@1 W0@1 B0@0 W0@0"]


@pytest.mark.parametrize("name", ("interleaved", "gis"))
@given(p=ranks, m=st.integers(1, 20))
@settings(max_examples=30, deadline=None)
def test_one_chunk_is_1f1b(name, p, m):
    """gis then is 1f1b with each backward pass as B and W."""
    whole = [
        [str(op).replace("BW", "B") for op in ops] for ops in generate("1f1b", ranks=p, microbatches=m, chunks=1).ranks
    ]
    kept = [
        [str(op).replace("BW", "B") for op in ops if op.kind is not Kinds.WEIGHT_GRAD]
        for ops in generate(name, ranks=p, microbatches=m, chunks=1).ranks
    ]
    assert kept == whole


def test_placements():
    assert placement("gis", 3, 2) == (0, 1, 2, 0, 1, 2)
    assert placement("1f1b", 3, 1) == (0, 1, 2)
    assert placement("v-half", 3, 2) == (0, 1, 2, 2, 1, 0)


def test_the_table():
    assert tuple(SCHEDULES) == (*NAMES, *OFFLOADED)
    assert all(name == s.name and s.text and "\n" not in s.text for name, s in SCHEDULES.items())
    assert all(callable(order_of(name)) for name in SCHEDULES)


@pytest.mark.parametrize("name", (*NAMES, *OFFLOADED))
@pytest.mark.parametrize("chunks", [1, 2])
def test_steady_schedules_hold_no_more_with_more_microbatches(name, chunks):
    chunks = SCHEDULES[name].chunks or chunks
    few, many = (generate(name, ranks=4, microbatches=m, chunks=chunks) for m in (4 * 4 + 2 * 4, 80))
    assert (peaks(few) == peaks(many)) == SCHEDULES[name].steady


@pytest.mark.parametrize(
    ("name", "size", "key", "says"),
    (
        ("zb-h3", {}, "parallel.pipeline.schedule", "did you mean zb-h"),
        ("nonsense", {}, "parallel.pipeline.schedule", "there are gpipe, 1f1b"),
        ("1f1b", {"chunks": 2}, "parallel.pipeline.chunks", "has 1 chunk per rank, got 2"),
        ("v-half", {"chunks": 3}, "parallel.pipeline.chunks", "has 2 chunks per rank, got 3"),
        ("gis", {"chunks": 0}, "parallel.pipeline.chunks", "at least 1, got 0"),
        ("gis", {"group": 1}, "parallel.pipeline.group", "must be 2 to 4"),
        ("gis", {"group": 5}, "parallel.pipeline.group", "must be 2 to 4"),
        ("interleaved", {"group": 3}, "parallel.pipeline.group", "must be at least 4"),
        ("1f1b", {"group": 4}, "parallel.pipeline.group", "only gis and interleaved have groups"),
        ("1f1b", {"microbatches": 0}, "", "0 microbatches"),
        ("1f1b", {"ranks": 0}, "parallel.pp", "at least 1, got 0"),
    ),
)
def test_mistakes_are_named(name, size, key, says):
    with pytest.raises(UserError, match=says) as caught:
        generate(name, **{"ranks": 4, "microbatches": 8, **size})
    assert [problem.key for problem in caught.value.problems] == [key]


def test_schedules_need_no_torch():
    code = "import sys, pentad.parallel.pipeline.schedules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
