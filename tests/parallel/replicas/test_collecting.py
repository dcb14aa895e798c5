"""Where a program gathers parameters: what is read is there, and no more than two stages of a rank are whole."""

from __future__ import annotations

from itertools import pairwise

import pytest

from pentad.parallel.pipeline.check import ProgramError, check_program
from pentad.parallel.pipeline.lower import forward_only, lower
from pentad.parallel.pipeline.memory import ActivationBytes, peak_bytes
from pentad.parallel.pipeline.needs import Kinds
from pentad.parallel.pipeline.program import Op, Program
from pentad.parallel.pipeline.refine import refine
from pentad.parallel.pipeline.schedules import generate
from pentad.parallel.pipeline.simulate import simulate
from pentad.parallel.pipeline.times import Times
from pentad.parallel.replicas.collecting import collecting, gathers

_READS = (Kinds.FORWARD, Kinds.BACKWARD, Kinds.INPUT_GRAD)
_TAKES = {Kinds.COLLECT_FORWARD: +1, Kinds.COLLECT_BACKWARD: +1, Kinds.DROP_FORWARD: -1, Kinds.DROP_BACKWARD: -1}


def _tokens(program: Program, rank: int = 0) -> str:
    return " ".join(map(str, program.ranks[rank]))


def _alone(parts: int, microbatches: int) -> Program:
    return refine(generate("1f1b", ranks=1, microbatches=microbatches), [parts])


def test_a_gather_starts_when_the_passes_before_it_do() -> None:
    assert _tokens(collecting(_alone(2, 1), [0, 1])) == (
        "PF0@0 PF0@1 HF0@0 F0@0 DF0@0 PB0@0 HF0@1 F0@1 BW0@1 DB0@1 HB0@0 BW0@0 DB0@0"
    )
    assert _tokens(collecting(_alone(2, 1), [0, 1], ahead=False)) == (
        "PF0@0 HF0@0 F0@0 DF0@0 PF0@1 HF0@1 F0@1 BW0@1 DB0@1 PB0@0 HB0@0 BW0@0 DB0@0"
    )


def test_stages_whose_parameters_are_whole_are_left_alone() -> None:
    assert _tokens(collecting(_alone(2, 1), [])) == _tokens(_alone(2, 1))
    assert gathers(collecting(_alone(2, 3), [1]).ranks[0]) == {1: 1}


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "dualpipev", "v-half"])
@pytest.mark.parametrize("ahead", [True, False])
def test_what_is_read_is_there_and_two_stages_at_most(name: str, ahead: bool) -> None:
    plain = generate(name, ranks=2, microbatches=6)
    refined = lower(refine(plain, [2] * plain.stages))
    program = collecting(refined, range(refined.stages), ahead=ahead)
    check_program(program)
    most = 0
    for ops in program.ranks:
        whole: set[int] = set()
        for op in ops:
            if _TAKES.get(op.kind) == 1:
                assert op.stage not in whole
                whole.add(op.stage)
            elif op.kind in _READS:
                assert op.stage in whole
            elif _TAKES.get(op.kind) == -1:
                whole.remove(op.stage)
            most = max(most, len(whole))
        assert not whole
    assert most == (2 if ahead else 1)
    sizes = ActivationBytes(activation=(0.0,), parameters=(1.0,))
    assert peak_bytes(program, sizes) == (float(most),) * 2


def test_evaluations_gather_too() -> None:
    program = collecting(refine(forward_only((0,), 2), [2]), [0, 1])
    check_program(program)
    assert gathers(program.ranks[0]) == {0: 2, 1: 2}


def test_gathers_are_simulated_beside_the_compute() -> None:
    plain, times = _alone(4, 2), Times(collect=(0.5,))
    alone = simulate(plain, times).makespan
    late, early = (simulate(collecting(plain, range(4), ahead=ahead), times) for ahead in (False, True))
    runs = sum(gathers(late.program.ranks[0]).values())
    assert late.makespan == pytest.approx(alone + 0.5 * runs)
    assert early.makespan == pytest.approx(alone + 0.5)  # the first one has nothing to hide behind
    begun = [span for op, span in zip(early.program.ranks[0], early.spans[0], strict=True) if op.kind in _TAKES]
    assert all(start <= after for (start, _), (after, _) in pairwise(begun))


def test_a_gather_that_nobody_waits_for_is_refused() -> None:
    program = collecting(_alone(1, 1), [0])
    wrong = tuple(op for op in program.ranks[0] if op != Op(Kinds.HAVE_FORWARD, 0, 0))
    with pytest.raises(ProgramError, match=r"PF0@0 .* is not followed by HF0@0"):
        check_program(Program(1, (0,), (wrong,)))
