"""The check: whether a program is complete and correct on all ranks, and finishes, found before it runs.

The classes of defects are looked for one after the other, because each relies on those before it; all defects of the
first class that has any are reported together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

from ...configs.errors import UserError
from .communication import (
    Key,
    Relation,
    SlotCounter,
    channel,
    consumers,
    counterpart,
    expected_communication,
    is_lowered,
    is_training,
    key,
    lanes,
    places,
    predecessors,
    releases,
)
from .deadlock import deadlock
from .kind import Acts, Kind, Role
from .memory import peak_activations
from .needs import KINDS, Kinds
from .program import Op, Program


class ProgramError(UserError):
    """A program that cannot be run; `problems` holds all defects of one class."""


def check_program(program: Program, *, limit: Sequence[float] | None = None) -> None:
    """Checks a compute-only or lowered program of a training step or an evaluation (one without backward passes).

    In this order: every operation once and on its rank; local order; sends and receives in the same order on each
    channel; the same order of collectives on all ranks; slots; deadlock, with sends that complete at once and with
    sends that complete when their receive is posted; activations.

    Args:
        limit: the most activations that each rank may hold, in microbatches of its whole share.

    Raises:
        ProgramError: all defects of the first class that has any.
    """
    training, lowered = is_training(program), is_lowered(program)
    classes: list[Callable[[Program], Iterator[str]]] = [_frame, partial(_compute, training=training)]
    classes += [partial(_update, training=training)]
    if lowered:
        classes += [partial(_communication, training=training)]
    classes += [partial(_local_order, training=training)]
    if lowered:
        classes += [_channels, _lanes]
    classes += [partial(_slots, training=training), _deadlock, partial(_activations, limit=limit)]
    for defects in classes:
        found = list(defects(program))
        if found:
            raise ProgramError(*found)


def _frame(program: Program) -> Iterator[str]:
    ranks = len(program.ranks)
    if program.vocab_barriers not in (0, 1, 2):
        yield f"vocab_barriers is {program.vocab_barriers}: there are 0 (not balanced), 1 or 2"
    if not program.placement:
        yield "the program has no stage"
    for stage, rank in enumerate(program.placement):
        if not 0 <= rank < ranks:
            yield f"stage {stage} is on rank {rank}, but there are {ranks} ranks"


def _compute(program: Program, training: bool) -> Iterator[str]:
    """Each stage computes each microbatch once, on its rank; vocabulary passes once on every rank or not at all."""
    due = [kind for kind in KINDS.values() if kind.local and not kind.optional and (training or not kind.trains)]
    due = [kind for kind in due if program.vocab_barriers or not kind.balanced]
    for rank, ops in enumerate(program.ranks):
        count = Counter((op.kind, op.index, op.stage) for op in ops if op.kind.local)
        want = _optional(program, rank, count)
        stages = program.stages_of(rank)
        for i in range(program.microbatches):
            for s in stages:
                want += _listed([kind for kind in due if kind.acts is Acts.STAGE], count, i, s)
            want += _listed([kind for kind in due if kind.acts is Acts.RANK], count, i, -1)
        yield from _differences(program, rank, count, want)


def _listed(due: list[Kind], count: Counter[Key], index: int, stage: int) -> list[Key]:
    """What of these kinds a microbatch must have: a fused one where only it is listed, else its halves."""
    halves = {kind: [KINDS[half] for half in kind.fuses] for kind in due if kind.fuses}
    fused = {
        kind
        for kind, parts in halves.items()
        if count[kind, index, stage] and not any(count[half, index, stage] for half in parts)
    }
    instead = {half for kind in fused for half in halves[kind]}
    return [(kind, index, stage) for kind in due if kind in fused or not (kind.fuses or kind in instead)]


def _optional(program: Program, rank: int, count: Counter[Key]) -> list[Key]:
    """What a program may have and has, where it belongs."""
    stages = program.stages_of(rank)
    return [
        (kind, i, s)
        for kind, i, s in count
        if kind.optional and 0 <= i < program.microbatches and (s in stages if kind.acts is Acts.STAGE else s == -1)
    ]


def _communication(program: Program, training: bool) -> Iterator[str]:
    """Each compute operation's communication, once and on its rank."""
    for rank, ops in enumerate(program.ranks):
        count = Counter((op.kind, op.index, op.stage) for op in ops if op.kind.communicates)
        rows = expected_communication(program, rank, training)
        want = [(kind, i, stage) for i in range(program.microbatches) for kind, stage in rows]
        yield from _differences(program, rank, count, want)


def _differences(program: Program, rank: int, count: Counter[Key], want: list[Key]) -> Iterator[str]:
    for wanted in want:
        times = count.pop(wanted, 0)
        if times != 1:
            yield f"rank {rank}: {Op(*wanted)} is listed {times} times, not once"
    for extra in count:
        if count[extra]:
            yield f"rank {rank}: {Op(*extra)} does not belong here ({_why(program, rank, Op(*extra))})"


def _why(program: Program, rank: int, op: Op) -> str:
    if not 0 <= op.index < program.microbatches:
        return f"there are {program.microbatches} microbatches"
    if op.kind.acts is Acts.STAGE:
        if not 0 <= op.stage < program.stages:
            return f"there are {program.stages} stages"
        if program.placement[op.stage] != rank:
            return f"stage {op.stage} is on rank {program.placement[op.stage]}"
    if op.kind.computes and op.kind.balanced and not program.vocab_barriers:
        return "the vocabulary is not balanced"
    for kind in KINDS.values():
        if kind.fuses and (op.kind is kind or op.kind.token in kind.fuses):
            return f"a backward pass is either {kind} or {' and '.join(kind.fuses)}"
    return "nothing needs it"


def _update(program: Program, training: bool) -> Iterator[str]:
    """Either no update, or on every rank after all else: each bucket's RG, one NORM, each bucket's OPT and then AG."""
    norms = [sum(op.kind is Kinds.NORM for op in ops) for ops in program.ranks]
    if len(set(norms)) > 1 or any(n > 1 for n in norms):
        yield f"NORM is listed {norms} times on the ranks: it must be once on all of them, or on none"
    for rank, ops in enumerate(program.ranks):
        tail = [op for op in ops if op.kind.updates]
        if not tail:
            continue
        if not training:
            yield f"rank {rank}: {tail[0]} updates, but the program has no backward pass"
        first = next(k for k, op in enumerate(ops) if op.kind.updates)
        for k, op in enumerate(ops[first:], first):
            if not op.kind.updates:
                yield f"rank {rank}: {op} (operation {k}) comes after {ops[first]}, which belongs to the update"
        buckets = 1 + max((op.index for op in tail), default=-1)
        per_bucket = [kind for kind in KINDS.values() if kind.updates and kind.acts is Acts.BUCKET]
        want = Counter(Op(kind, i) for kind in per_bucket for i in range(buckets))
        have = Counter(op for op in tail if op.kind is not Kinds.NORM)
        for op in sorted((want | have).keys(), key=str):
            if have[op] != want[op]:
                yield f"rank {rank}: {op} is listed {have[op]} times, not {want[op]} times"
        for earlier, later in pairwise(tail):
            if earlier.kind.phase > later.kind.phase:
                yield f"rank {rank}: {earlier} comes before {later}"
        place = {op: k for k, op in enumerate(tail)}
        for op, k in place.items():
            if op.kind is Kinds.GATHER and place.get(Op(Kinds.OPTIMIZE, op.index), -1) > k:
                yield f"rank {rank}: {op} comes before {Op(Kinds.OPTIMIZE, op.index)}"
        if not norms[rank]:
            yield f"rank {rank}: the update has no NORM"


def _local_order(program: Program, training: bool) -> Iterator[str]:
    """What needs each other on the same rank is in that order in its list."""
    for rank, ops in enumerate(program.ranks):
        place = places(ops)
        earlier = Relation(lambda op, rank=rank: predecessors(program, op, rank))
        later = Relation(lambda op, rank=rank: consumers(program, op, rank, training) if op.kind.communicates else ())
        for k, op in enumerate(ops):
            row = op.kind, op.stage
            for kind, stage in earlier[row]:
                at = place.get((kind, op.index, stage))
                if at is None:
                    yield f"{_where(rank, op, k)} needs {Op(kind, op.index, stage)}, which is not listed"
                elif at > k:
                    yield f"{_where(rank, op, k)} comes before {_at(program, rank, at)}"
            if op.kind.before:
                next_one = Op(KINDS[op.kind.before], op.index, op.stage)
                if key(next_one) not in place:
                    yield f"{_where(rank, op, k)} is not followed by {next_one}"
                elif place[key(next_one)] < k:
                    yield f"{_where(rank, op, k)} comes after {_at(program, rank, place[key(next_one)])}"
            for kind, stage in later[row]:
                if (at := place[kind, op.index, stage]) < k:
                    yield f"{_where(rank, op, k)} comes after {_at(program, rank, at)}"


def _where(rank: int, op: Op, position: int) -> str:
    return f"rank {rank}: {op} (operation {position})"


def _at(program: Program, rank: int, position: int) -> str:
    return f"{program.ranks[rank][position]} (operation {position})"


def _channels(program: Program) -> Iterator[str]:
    """The k-th receive of a channel takes what its k-th send gives."""
    sends: dict[tuple[int, int], list[int]] = {}
    receives: dict[tuple[int, int], list[int]] = {}
    for rank, ops in enumerate(program.ranks):
        for k, op in enumerate(ops):
            if op.kind.transfers:
                (sends if op.kind.role is Role.SEND else receives).setdefault(channel(op, rank, program), []).append(k)
    for where, given in sorted(sends.items()):
        source, destination = where
        for n, (a, b) in enumerate(zip(given, receives[where], strict=True)):
            if key(counterpart(program.ranks[source][a])) != key(program.ranks[destination][b]):
                yield (
                    f"channel from rank {source} to rank {destination}: send {n} is {_at(program, source, a)}, "
                    f"receive {n} is {_at(program, destination, b)}"
                )
                break


def _lanes(program: Program) -> Iterator[str]:
    """All ranks join the collectives of a lane in one order."""
    for name in lanes():
        orders = [tuple(k for k, op in enumerate(ops) if op.kind.lane == name) for ops in program.ranks]
        tokens = [tuple(ops[k] for k in order) for ops, order in zip(program.ranks, orders, strict=True)]
        common = Counter(tokens).most_common(1)[0][0]
        reference = tokens.index(common)
        for rank, mine in enumerate(tokens):
            for n, (a, b) in enumerate(zip(mine, common, strict=True)):
                if a != b:
                    yield (
                        f"{name} lane: collective {n} is {_at(program, rank, orders[rank][n])} on rank {rank}, "
                        f"{_at(program, reference, orders[reference][n])} on rank {reference}"
                    )
                    break


def _slots(program: Program, training: bool) -> Iterator[str]:
    """What fills a slot takes the smallest one that is free, so it never overwrites one in use."""
    for rank, ops in enumerate(program.ranks):
        counter = SlotCounter(training)
        for k, op in enumerate(ops):
            counter.step(op)
            if not op.kind.slot_until[0]:
                if op.slot >= 0:
                    what = "only receives and copies to the host and the disk do"
                    yield f"{_where(rank, op, k)} has a slot, but {what}"
                continue
            holder = counter.holder(op)
            if op.slot < 0:
                yield f"{_where(rank, op, k)} has no slot"
            elif holder is not None:
                end = next(n for n, user in enumerate(ops) if holder in releases(user, training))
                what = f"slot {op.slot}, which {Op(*holder)} needs until operation {end}"
                yield f"{_where(rank, op, k)} overwrites {what}"
            elif op.slot != (free := counter.smallest(op)):
                yield f"{_where(rank, op, k)} takes slot {op.slot}, but the smallest free one is {free}"
            counter.take(op)


def _deadlock(program: Program) -> Iterator[str]:
    words = deadlock(program)
    if words is not None:
        yield words


def _activations(program: Program, limit: Sequence[float] | None) -> Iterator[str]:
    if limit is None:
        return
    if len(limit) != len(program.ranks):
        raise ValueError(f"{len(limit)} limits for {len(program.ranks)} ranks")
    for rank, (peak, most) in enumerate(zip(peak_activations(program), limit, strict=True)):
        if peak > most + 1e-9:
            yield f"rank {rank} holds {peak:g} activations of a microbatch, more than the limit of {most:g}"
