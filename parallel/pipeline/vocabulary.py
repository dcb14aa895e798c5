"""Vocabulary balance: embedding, head and loss sharded over all ranks of the pipeline (Yeung et al., Balancing Pipeline
Parallelism with Vocabulary Parallelism, 2024, for 1f1b and v-half; interleaved and gis are ours).

Every rank runs S, T, IF and IB of every microbatch, and the last stage's backward waits for a barrier over all ranks
(two with `vocab_barriers=2`). Two steps make that free:

1. **Delay.** Each backward pass moves behind a few more forward passes of its rank, so that the ranks have something
   to do between the last stage's forward and backward. It costs those forward passes' activations, and no time.
2. **Insert.** The delayed schedule is simulated without the vocabulary. All ranks then stop at the same instants for a
   vocabulary pass: each at the end of what it is running. Beside a schedule that everybody interrupts at that very
   instant, no stage passes run later, and the vocabulary pass ends late by what was left of the running pass. So there
   is no bubble beyond the schedule's own where the delay covers the longest pass and the collectives.

The order of the vocabulary passes is the same on all ranks, and the program cannot get stuck: every operation is placed
by its instant in one simulated run, in which whatever it needs came first.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ...configs.errors import UserError
from ...configs.tables.schedules import SCHEDULES, default_chunks, find_schedule, schedule_problems
from .kind import Kind
from .needs import KINDS, Kinds
from .program import Op, Program
from .schedules import generate, order_of
from .schedules.base import Shape
from .simulate import Timeline, simulate
from .times import Times

_HEAD, _EMBED = (0.3,), (0.02,)
"""S and T, and IF and IB, beside F of a rank's whole share: what orders are made for where no times are given."""

_SEARCHED = 4
"""How many delays to try for interleaved and gis, from the number of barriers on."""

_SLIGHT = 1e-3
"""A step shorter by less of it is not worth the activations of one more delay."""

_ORDER = {Kinds.EMBED: 0, Kinds.HEAD: 1, Kinds.HEAD_GRAD: 2, Kinds.EMBED_GRAD: 3}
"""Of one microbatch's passes at the same instant; of several microbatches the oldest goes first and frees memory."""


def balanced(
    name: str,
    *,
    ranks: int,
    microbatches: int,
    chunks: int | None = None,
    group: int | None = None,
    barriers: int = 1,
    times: Times | None = None,
) -> Program:
    """The compute operations of one training step whose vocabulary is balanced over all ranks.

    The activations of 1f1b and v-half grow by `barriers` microbatches. Those of interleaved and gis grow by that many
    chunks, or by more where only that leaves no bubble beyond the schedule's own.

    Args:
        name: of a schedule that can be balanced.
        ranks: of the pipeline axis, p.
        microbatches: per step, m; any number from 1 on.
        chunks: stages per rank, as in `generate`.
        group: microbatches that a chunk takes in turn, as in `generate`.
        barriers: between the last stage's forward and backward: 1, or 2 (fewer GEMMs in S, more memory).
        times: what the order is made for, by default F = B = W = 1 and S = T = 0.3 per rank. All ranks must give the
            same.

    Raises:
        UserError: the schedule cannot be balanced, or a number that does not fit it.
    """
    find_schedule(name)
    stages = default_chunks(name) if chunks is None else chunks
    problems = schedule_problems(name, ranks=ranks, chunks=stages, group=group, barriers=barriers)
    if problems:
        raise UserError(*problems)
    plain = generate(name, ranks=ranks, microbatches=microbatches, chunks=chunks, group=group)
    times = times or _usual_times(plain.chunks)
    if ranks == 1:
        return _inserted(plain, barriers, times)
    if SCHEDULES[name].group is None:
        return _inserted(_delayed(name, plain, group, barriers), barriers, times)
    reach = _reach(plain, times)
    tried: list[tuple[float, Program]] = []
    for delay in range(barriers, barriers + _SEARCHED):
        program = _inserted(_delayed(name, plain, group, delay), barriers, times)
        tried.append((simulate(program, times).makespan, program))
        if tried[-1][0] <= reach:
            return program
    good = min(step for step, _ in tried) * (1 + _SLIGHT)
    return next(program for step, program in tried if step <= good)


def _reach(plain: Program, times: Times) -> float:
    """The step with the schedule's own bubble, and the collectives before its first and after its last stage pass."""
    vocabulary = max(
        sum(times.of(Op(kind, 0), rank) for kind in KINDS.values() if kind.computes and kind.balanced)
        for rank in range(len(plain.ranks))
    )
    step = simulate(plain, times).makespan + plain.microbatches * vocabulary + 2 * times.collective
    return step * (1 + 1e-9)


def _usual_times(chunks: int) -> Times:
    stage = (1.0 / chunks,)
    return Times(
        forward=stage, backward=stage, weight=stage, head=_HEAD, head_grad=_HEAD, embed=_EMBED, embed_grad=_EMBED
    )


def _delayed(name: str, plain: Program, group: int | None, delay: int) -> Program:
    ranks = len(plain.ranks)
    shape = Shape(ranks, plain.microbatches, plain.chunks, ranks if group is None else group, delay)
    return replace(plain, ranks=order_of(name)(shape))


@dataclass(frozen=True)
class _Clock:
    """When the passes of a schedule run.

    Args:
        starts: of each rank's passes, in order.
        ends: the same for their ends.
        of: start and end of each pass (a BW counts as B), by (kind, microbatch, stage).
        close: instants nearer than this are the same.
    """

    starts: tuple[list[float], ...]
    ends: tuple[list[float], ...]
    of: dict[tuple[Kind, int, int], tuple[float, float]]
    close: float

    @staticmethod
    def read(timeline: Timeline, close: float) -> _Clock:
        of = {}
        for ops, spans in zip(timeline.program.ranks, timeline.spans, strict=True):
            for op, span in zip(ops, spans, strict=True):
                kind = Kinds.INPUT_GRAD if op.kind is Kinds.BACKWARD else op.kind
                of[kind, op.index, op.stage] = span
        starts = tuple([start for start, _ in spans] for spans in timeline.spans)
        ends = tuple([end for _, end in spans] for spans in timeline.spans)
        return _Clock(starts, ends, of, close)

    def position(self, rank: int, instant: float) -> int:
        """How many of a rank's passes started before an instant."""
        return bisect_left(self.starts[rank], instant - self.close)

    def stopped(self, instant: float) -> float:
        """When all ranks have finished what they were running at an instant."""
        positions = (self.position(rank, instant) for rank in range(len(self.ends)))
        return max((e[k - 1] for e, k in zip(self.ends, positions, strict=True) if k), default=0.0)


def _inserted(program: Program, barriers: int, times: Times) -> Program:
    """The schedule with S, T, IF and IB of every microbatch on every rank."""
    times, shortest = _positive(times)
    clock = _Clock.read(simulate(program, times), close=shortest * 1e-3)
    passes = sorted(
        (instant, op.index, _ORDER[op.kind], op) for instant, op in _passes(program, barriers, times, clock)
    )
    ranks = []
    for rank, ops in enumerate(program.ranks):
        out: list[Op] = []
        taken = 0
        for instant, *_, op in passes:
            position = clock.position(rank, instant)
            out += ops[taken:position]
            taken = max(taken, position)
            out.append(op)
        ranks.append((*out, *ops[taken:]))
    return replace(program, ranks=tuple(ranks), vocab_barriers=barriers)


def _passes(program: Program, barriers: int, times: Times, clock: _Clock) -> Iterable[tuple[float, Op]]:
    """The instant of each vocabulary pass, in the time of a schedule without them."""
    last = program.stages - 1
    longest = max(end - start for start, end in clock.of.values())
    for i in range(program.microbatches):
        forward, backward = clock.of[Kinds.FORWARD, i, last], clock.of[Kinds.INPUT_GRAD, i, last]
        head = min(forward[1] + times.collective, backward[0])
        grad = max(clock.stopped(head), head) + times.collective
        if barriers == 2:
            grad = min(grad, backward[0])
        yield head, Op(Kinds.HEAD, i)
        yield grad, Op(Kinds.HEAD_GRAD, i)
        # Early enough for every rank to end what it runs and for the sum to arrive, no earlier: rank 0 holds three.
        yield max(0.0, clock.of[Kinds.FORWARD, i, 0][0] - longest - times.collective), Op(Kinds.EMBED, i)
        yield clock.of[Kinds.INPUT_GRAD, i, 0][1] + times.collective, Op(Kinds.EMBED_GRAD, i)


def _positive(times: Times) -> tuple[Times, float]:
    """Times with no stage pass of no duration, so that instants tell what comes first; and the shortest of them."""
    given = (*times.forward, *times.backward, *times.weight)
    least = 1e-6 * max(given) or 1.0
    forward, backward, weight = (
        tuple(max(t, least) for t in stage) for stage in (times.forward, times.backward, times.weight)
    )
    return replace(times, forward=forward, backward=backward, weight=weight), min(*forward, *backward, *weight)
