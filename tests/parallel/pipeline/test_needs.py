"""A kind of operation costs one row and one handler: a made-up one is checked, simulated, drawn and executed."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from pentad.parallel.pipeline import needs
from pentad.parallel.pipeline.check import ProgramError, check_program
from pentad.parallel.pipeline.draw import svg, terminal
from pentad.parallel.pipeline.kind import Acts, Hold, Kind, Need, Place, Role
from pentad.parallel.pipeline.lower import lower
from pentad.parallel.pipeline.memory import ActivationBytes, peak_bytes
from pentad.parallel.pipeline.needs import KINDS, Kinds, kind_of, register
from pentad.parallel.pipeline.program import Op, Program, update
from pentad.parallel.pipeline.schedules import generate
from pentad.parallel.pipeline.simulate import StuckError, simulate
from pentad.parallel.pipeline.times import Times
from pentad.trainer.step import Stepper
from tests.training import Run, job


@pytest.fixture
def squeeze() -> Iterator[Kind]:
    """Something that a stage does with a microbatch between its forward and its backward pass."""
    kind = register(
        Kind(
            token="SQ",
            acts=Acts.STAGE,
            role=Role.COMPUTE,
            words="squeeze",
            needs=(Need("F", Place.SAME),),
            optional=True,
            holds=(Hold("head", +1, at_end=False),),
            hue="#123456",
        )
    )
    yield kind
    del KINDS[kind.token]
    needs.flows.cache_clear()


def _squeezed(program: Program, kind: Kind) -> Program:
    """The program with the kind after every forward pass."""

    def after(op: Op) -> tuple[Op, ...]:
        return (op, Op(kind, op.index, op.stage)) if op.kind is Kinds.FORWARD else (op,)

    return replace(program, ranks=tuple(tuple(each for op in ops for each in after(op)) for ops in program.ranks))


def _plain() -> Program:
    return generate("1f1b", ranks=3, microbatches=5)


def test_it_is_checked_and_lowered(squeeze: Kind) -> None:
    program = _squeezed(_plain(), squeeze)
    check_program(program)
    lowered = lower(program)
    check_program(lowered)
    assert Program.from_json(lowered.to_json()) == lowered
    plain = lower(_plain())
    without = tuple(tuple(op for op in ops if op.kind is not squeeze) for ops in lowered.ranks)
    assert [sorted(map(str, ops)) for ops in without] == [sorted(map(str, ops)) for ops in plain.ranks]


@pytest.mark.parametrize(
    ("rank", "old", "new", "message"),
    [
        (0, "F1@0", "SQ1@0 F1@0", "SQ1@0 is listed 2 times"),
        (1, "SQ0@1", "SQ0@0", "stage 0 is on rank 0"),
        (1, "SQ0@1", "SQ9@1", "there are 5 microbatches"),
        (2, "F0@2 SQ0@2", "SQ0@2 F0@2", "comes before F0@2"),
    ],
)
def test_what_is_wrong_with_it_is_said(squeeze: Kind, rank: int, old: str, new: str, message: str) -> None:
    program = _squeezed(_plain(), squeeze)
    text = " ".join(map(str, program.ranks[rank]))
    assert f" {old} " in f" {text} "
    edited = tuple(Op.parse(token) for token in f" {text} ".replace(f" {old} ", f" {new} ").split())
    broken = replace(program, ranks=(*program.ranks[:rank], edited, *program.ranks[rank + 1 :]))
    with pytest.raises(ProgramError, match=message):
        check_program(broken)


def test_it_is_simulated_with_its_own_time(squeeze: Kind) -> None:
    program = _squeezed(_plain(), squeeze)
    for each in (program, lower(program)):
        took = simulate(each, Times(other={"SQ": (0.5,)}, hop=0.1)).makespan
        # Its results stay on its stage, so only what follows on the same rank is later: brute force by hand.
        assert took == pytest.approx(_by_hand(program, 0.5, 0.1))
    assert simulate(program, Times()).makespan == simulate(_plain(), Times()).makespan
    alone = replace(program, ranks=((Op(squeeze, 0, 0),), *program.ranks[1:]))
    with pytest.raises(StuckError, match="SQ0@0"):
        simulate(alone, Times())


def _by_hand(program: Program, squeeze: float, hop: float) -> float:
    """Every operation as soon as its rank and its neighbour allow; F = B = W = 1."""
    cost = {Kinds.FORWARD: 1.0, Kinds.BACKWARD: 2.0}
    ended: dict[tuple[str, int, int], float] = {}
    at, clock = [0] * len(program.ranks), [0.0] * len(program.ranks)
    while any(position < len(ops) for position, ops in zip(at, program.ranks, strict=True)):
        for rank, ops in enumerate(program.ranks):
            if at[rank] == len(ops):
                continue
            op = ops[at[rank]]
            source = op.stage - 1 if op.kind is Kinds.FORWARD else op.stage + 1
            waits = op.kind in cost and 0 <= source < program.stages
            if waits and (op.kind.token, op.index, source) not in ended:
                continue
            come = ended[op.kind.token, op.index, source] + hop if waits else 0.0
            clock[rank] = max(clock[rank], come) + cost.get(op.kind, squeeze)
            ended[op.kind.token, op.index, op.stage] = clock[rank]
            at[rank] += 1
    return max(clock)


def test_its_memory_is_counted(squeeze: Kind) -> None:
    sizes = ActivationBytes(activation=(0.0,), head=(7.0,))
    # Nothing gives it back, so it goes at the end of the operation.
    assert peak_bytes(_squeezed(_plain(), squeeze), sizes) == (7.0, 7.0, 7.0)


def test_it_is_drawn(squeeze: Kind) -> None:
    timeline = simulate(_squeezed(_plain(), squeeze), Times(other={"SQ": (0.5,)}))
    assert "SQ squeeze" in svg(timeline) and "#123456" in svg(timeline)
    assert "SQ squeeze" in terminal(timeline)


def test_it_is_executed(squeeze: Kind) -> None:
    done: list[str] = []

    def make(cfg: Any, parts: Any, optimizer: Any, mesh: Any, program: Program) -> Stepper:
        squeezed = _squeezed(program, squeeze)
        check_program(squeezed)
        stepper = Stepper(cfg, parts, optimizer, mesh, squeezed)
        stepper._handlers[squeeze] = lambda op: done.append(str(op))
        return stepper

    run = Run(0, job(steps=1), stepper=make)
    try:
        result = run.issue(0)
    finally:
        run.close()
    assert done == [f"SQ{i}@0" for i in range(4)] and float(result.loss) > 0


def test_a_token_belongs_to_one_kind(squeeze: Kind) -> None:
    with pytest.raises(ValueError, match="there is a kind SQ already"):
        register(replace(squeeze, words="another"))
    with pytest.raises(ValueError, match="'ZZ' is no kind"):
        kind_of("ZZ")


def test_kinds_keep_their_identity_between_processes() -> None:
    ops = (Op(Kinds.FORWARD, 1, 2), *update(1))
    assert pickle.loads(pickle.dumps(ops)) == ops


def test_every_need_names_a_kind_and_every_carrier_carries_something() -> None:
    for kind in KINDS.values():
        for need in kind.needs:
            assert need.kind in KINDS and (not need.by or KINDS[need.by].communicates or KINDS[need.by].engine)
        if kind.role in (Role.SEND, Role.COLLECTIVE):
            # What it brings comes from one kind, whoever waits for it.
            assert len({flow.source for flow in needs.flows(kind.token)}) == 1
        if kind.transfers:
            assert KINDS[kind.pair].pair == kind.token and KINDS[kind.pair].toward == -kind.toward
