"""The check finds every kind of defect, names it, and finds none in correct programs."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from pentad.parallel.pipeline.check import ProgramError, check_program
from pentad.parallel.pipeline.lower import forward_only, lower
from pentad.parallel.pipeline.needs import Kinds
from pentad.parallel.pipeline.program import Op, Ops, Program, update
from pentad.parallel.pipeline.schedules import generate
from pentad.parallel.pipeline.simulate import simulate
from pentad.parallel.pipeline.times import Times
from pentad.parallel.pipeline.vocabulary import balanced
from tests.parallel.pipeline.broken import broken_programs, sound_program


def _ops(text: str) -> Ops:
    return tuple(Op.parse(token) for token in text.split())


def _program(*ranks: str, m: int, placement: tuple[int, ...] | None = None, barriers: int = 0) -> Program:
    lists = tuple(_ops(rank) for rank in ranks)
    return Program(m, placement or tuple(range(len(ranks))), lists, barriers)


def _edited(program: Program, rank: int, *edits: tuple[str, str]) -> Program:
    """The program with some tokens of a rank's list replaced; an empty string drops one."""
    text = " " + " ".join(map(str, program.ranks[rank])) + " "
    for old, new in edits:
        assert text.count(f" {old} ") == 1, (old, text)
        text = text.replace(f" {old} ", f" {new} ")
    lists = list(program.ranks)
    lists[rank] = _ops(text)
    return replace(program, ranks=tuple(lists))


def _defects(program: Program, limit: list[float] | None = None) -> list[str]:
    with pytest.raises(ProgramError) as error:
        check_program(program, limit=limit)
    return [str(problem) for problem in error.value.problems]


PLAIN = lower(generate("1f1b", ranks=2, microbatches=3, chunks=1))
SPLIT = lower(generate("zb-h1", ranks=2, microbatches=3, chunks=1))
BALANCED = lower(balanced("1f1b", ranks=2, microbatches=3, barriers=2))


def test_the_program_that_the_other_tests_break() -> None:
    assert [" ".join(map(str, ops)) for ops in PLAIN.ranks] == [
        "F0@0 SF0@0 RB0@0#0 F1@0 SF1@0 BW0@0 RB1@0#0 F2@0 SF2@0 RB2@0#1 BW1@0 BW2@0",
        "RF0@1#0 F0@1 RF1@1#1 BW0@1 SB0@1 F1@1 RF2@1#0 BW1@1 SB1@1 F2@1 BW2@1 SB2@1",
    ]
    for program in (PLAIN, SPLIT, BALANCED):
        check_program(program)


def test_completeness_lists_all_that_is_wrong() -> None:
    program = _edited(PLAIN, 0, ("F1@0", ""), ("BW2@0", "B2@0"))
    assert _defects(_edited(program, 1, ("F2@1", "F2@0"))) == [
        "rank 0: F1@0 is listed 0 times, not once",
        "rank 0: W2@0 is listed 0 times, not once",
        "rank 1: F2@1 is listed 0 times, not once",
        "rank 1: F2@0 does not belong here (stage 0 is on rank 0)",
    ]


@pytest.mark.parametrize(
    "edit, defect",
    [
        (("F1@0", "F7@0"), "rank 0: F7@0 does not belong here (there are 3 microbatches)"),
        (("F1@0", "F1@5"), "rank 0: F1@5 does not belong here (there are 2 stages)"),
        (("F1@0", "F1@0 S0"), "rank 0: S0 does not belong here (the vocabulary is not balanced)"),
        (("BW1@0", "BW1@0 W1@0"), "rank 0: BW1@0 does not belong here (a backward pass is either BW or B and W)"),
        (("F1@0", "F1@0 F1@0"), "rank 0: F1@0 is listed 2 times, not once"),
        (("SF1@0", ""), "rank 0: SF1@0 is listed 0 times, not once"),
        (("SF1@0", "SF1@0 CX0"), "rank 0: CX0 does not belong here (nothing needs it)"),
        (("RB1@0#0", "RB0@0#1"), "rank 0: RB1@0 is listed 0 times, not once"),
    ],
)
def test_what_does_not_belong_and_what_is_missing(edit: tuple[str, str], defect: str) -> None:
    assert defect in _defects(_edited(PLAIN, 0, edit))


def test_a_program_must_have_the_ranks_it_places_stages_on() -> None:
    assert _defects(_program("F0@0 BW0@0", m=1, placement=(0, 2))) == ["stage 1 is on rank 2, but there are 1 ranks"]
    assert _defects(Program(1, (), ((),))) == ["the program has no stage"]
    assert "vocab_barriers is 3" in _defects(_program("F0@0 BW0@0", m=1, barriers=3))[0]


@pytest.mark.parametrize(
    "program, rank, edits, defect",
    [
        (PLAIN, 0, [("SF1@0", "X"), ("F1@0", "SF1@0 F1@0")], "SF1@0 (operation 3) comes before F1@0 (operation 4)"),
        (PLAIN, 1, [("F1@1", "X"), ("BW1@1", "BW1@1 F1@1")], "BW1@1 (operation 6) comes before F1@1 (operation 7)"),
        (PLAIN, 1, [("RF2@1#0", "X"), ("F2@1", "F2@1 RF2@1#0")], "RF2@1#0 (operation 9) comes after F2@1 (op"),
        (SPLIT, 0, [("W0@0", "X"), ("B0@0", "W0@0 B0@0")], "comes before B0@0"),
        (BALANCED, 0, [("CX0", "X"), ("S0", "S0 CX0")], "comes after S0"),
        (BALANCED, 1, [("CS0", "X"), ("S0", "CS0 S0")], "comes before S0"),
        (BALANCED, 1, [("CD0", "X"), ("BW0@1", "BW0@1 CD0")], "comes after BW0@1"),
        (BALANCED, 0, [("CE0", "X"), ("F0@0", "F0@0 CE0")], "comes after F0@0"),
        (BALANCED, 0, [("CG0", "X"), ("BW0@0", "CG0 BW0@0")], "comes before BW0@0"),
        (BALANCED, 1, [("CG0", "X"), ("IB0", "IB0 CG0")], "comes after IB0"),
    ],
)  # fmt: skip
def test_local_order(program: Program, rank: int, edits: list[tuple[str, str]], defect: str) -> None:
    edits = [(old, "" if new == "X" else new) for old, new in edits]
    assert any(defect in found for found in _defects(_edited(program, rank, *edits)))


def test_stages_on_one_rank_hand_over_in_its_list() -> None:
    program = _program("F0@1 F0@0 BW0@1 BW0@0", m=1, placement=(0, 0))
    assert _defects(program) == ["rank 0: F0@1 (operation 0) comes before F0@0 (operation 1)"]


def test_receives_are_in_the_order_of_sends() -> None:
    program = _edited(PLAIN, 1, ("RF0@1#0", "RF1@1#0 RF0@1#1"), ("RF1@1#1", ""))
    program = _edited(program, 1, ("RF1@1#0", "RF1@1#0"), ("RF0@1#1", "RF0@1#0"))
    assert _defects(program) == [
        "channel from rank 0 to rank 1: send 0 is SF0@0 (operation 1), receive 0 is RF1@1#0 (operation 0)"
    ]


def test_collectives_are_in_one_order() -> None:
    program = lower(balanced("1f1b", ranks=3, microbatches=3))
    first = [op for op in program.ranks[0] if op.kind is Kinds.EMBEDDED][:2]
    assert first == [Op(Kinds.EMBEDDED, 0), Op(Kinds.EMBEDDED, 1)]
    at = next(k for k, op in enumerate(program.ranks[1]) if op == first[1])
    ops = list(program.ranks[1])
    ops.remove(first[0])
    ops.insert(at, first[0])  # behind CE1
    swapped = replace(program, ranks=(program.ranks[0], tuple(ops), program.ranks[2]))
    (defect,) = _defects(swapped)
    at0 = program.ranks[0].index(first[0])
    assert defect == (
        f"embed lane: collective 0 is CE1 (operation {at - 1}) on rank 1, CE0 (operation {at0}) on rank 0"
    )


@pytest.mark.parametrize(
    "edit, defect",
    [
        (
            ("RF1@1#1", "RF1@1#0"),
            "rank 1: RF1@1#0 (operation 2) overwrites slot 0, which RF0@1 needs until operation 3",
        ),
        (("RF1@1#1", "RF1@1#2"), "rank 1: RF1@1#2 (operation 2) takes slot 2, but the smallest free one is 1"),
        (("RF1@1#1", "RF1@1"), "rank 1: RF1@1 (operation 2) has no slot"),
        (
            ("F1@1", "F1@1#0"),
            "rank 1: F1@1#0 (operation 5) has a slot, but only receives and copies to the host and the disk do",
        ),
    ],
)
def test_slots(edit: tuple[str, str], defect: str) -> None:
    assert _defects(_edited(PLAIN, 1, edit))[0] == defect


def test_a_slot_is_in_use_until_the_deferred_weight_gradient() -> None:
    ops = "RF0@1#0 F0@1 B0@1 SB0@1 RF1@1#0 F1@1 W0@1 B1@1 SB1@1 W1@1"
    sender = "F0@0 SF0@0 F1@0 SF1@0 RB0@0#0 B0@0 W0@0 RB1@0#0 B1@0 W1@0"
    assert _defects(_program(sender, ops, m=2)) == [
        "rank 1: RF1@1#0 (operation 4) overwrites slot 0, which RF0@1 needs until operation 6"
    ]
    check_program(_program(sender, ops.replace("RF1@1#0", "RF1@1#1"), m=2))


def test_deadlock_says_who_waits_for_whom() -> None:
    program = _program(
        "F0@0 SF0@0 RB0@0#0 BW0@0 F1@0 SF1@0 RB1@0#0 BW1@0",
        "RF0@1#0 F0@1 RF1@1#1 F1@1 BW0@1 SB0@1 BW1@1 SB1@1",
        m=2,
    )
    assert _defects(program) == [
        "deadlock: rank 0 at BW0@0 (operation 3) waits for the gradient that rank 1 sends in SB0@1 (operation 5); "
        "rank 1 at F1@1 (operation 3) waits for the activations that rank 0 sends in SF1@0 (operation 5)"
    ]


def test_deadlock_only_where_sends_wait_for_their_receives() -> None:
    m = range(6)
    first = [f"F{i}@0 SF{i}@0" for i in m] + [f"RB{i}@0#0 BW{i}@0" for i in m]
    second = [f"RF{i}@1#0 F{i}@1 BW{i}@1 SB{i}@1" for i in m]
    program = _program(" ".join(first), " ".join(second), m=6)
    assert _defects(program) == [
        "deadlock where a send is complete only when its receive is posted: "
        "rank 0 at SF5@0 (operation 11) waits for rank 1 to post RF3@1#0 (operation 12), with 2 sends outstanding; "
        "rank 1 at SB2@1 (operation 11) waits for rank 0 to post RB0@0#0 (operation 12), with 2 sends outstanding"
    ]


def test_of_several_cycles_the_smallest_is_told() -> None:
    rest = "S1 T1 BW0@{0} BW1@{0} IB0 IB1"
    program = _program(
        "IF0 IF1 F0@0 S0 T0 F1@0 " + rest.format(0),
        "IF0 IF1 F0@1 F1@1 S0 T0 " + rest.format(1),
        "IF0 IF1 F0@2 F1@2 S0 T0 " + rest.format(2),
        m=2,
        barriers=1,
    )  # rank 0 waits for ranks 1 and 2, rank 2 for rank 1, rank 1 for rank 0
    assert _defects(program) == [
        "deadlock: rank 0 at T0 (operation 4) waits for rank 1 to finish S0 (operation 4); "
        "rank 1 at F1@1 (operation 3) waits for rank 0 to finish F1@0 (operation 5)"
    ]


def test_deadlock_in_a_collective() -> None:
    program = _program(
        "IF0 CE0 IF1 CE1 F0@0 SF0@0 CX0 S0 CS0 F1@0 SF1@0 CX1 S1 CS1",
        "IF0 CE0 RF0@1#0 F0@1 RF1@1#0 CX0 S0 CS0 F1@1 CX1 S1 CS1 IF1 CE1",
        m=2,
        barriers=1,
    )
    assert _defects(program) == [
        "deadlock: rank 0 at F1@0 (operation 9) waits for rank 1 to join CE1 (operation 13); "
        "rank 1 at F1@1 (operation 8) waits for the activations that rank 0 sends in SF1@0 (operation 10)"
    ]


def test_activations_within_the_limit() -> None:
    program = lower(generate("1f1b", ranks=4, microbatches=8, chunks=1))
    check_program(program, limit=[4, 3, 2, 1])
    assert _defects(program, [4, 2.5, 2, 1]) == [
        "rank 1 holds 3 activations of a microbatch, more than the limit of 2.5"
    ]
    check_program(generate("zb-v", ranks=4, microbatches=12, chunks=2), limit=[4, 4, 4, 4])
    check_program(forward_only((0, 1, 1, 0), 5), limit=[0.5, 0.5])
    assert len(_defects(forward_only((0, 1, 1, 0), 5), [0.4, 0.4])) == 2
    with pytest.raises(ValueError, match="1 limits for 4 ranks"):
        check_program(program, limit=[1])


def test_evaluation() -> None:
    program = lower(forward_only((0, 1), 3, 1))
    check_program(program)
    assert _defects(_edited(program, 1, ("F1@1", ""))) == ["rank 1: F1@1 is listed 0 times, not once"]
    assert "rank 1: CG0 does not belong here (nothing needs it)" in _defects(_edited(program, 1, ("S2", "S2 CG0")))
    assert "takes slot 1, but the smallest free one is 0" in _defects(_edited(program, 1, ("RF2@1#0", "RF2@1#1")))[0]


@pytest.mark.parametrize(
    "edit, defect",
    [
        (("RG1", ""), "rank 0: RG1 is listed 0 times, not 1 times"),
        (("OPT0", "OPT2"), "rank 0: OPT0 is listed 0 times, not 1 times"),
        (("NORM", ""), "NORM is listed [0, 1] times on the ranks: it must be once on all of them, or on none"),
        (("RG1", "RG1 NORM"), "NORM is listed [2, 1] times on the ranks: it must be once on all of them, or on none"),
        (("RG1", "BW9@0 RG1"), "rank 0: BW9@0 does not belong here (there are 3 microbatches)"),
        (("AG0", "AG0 AG0"), "rank 0: AG0 is listed 2 times, not 1 times"),
    ],
)
def test_the_update(edit: tuple[str, str], defect: str) -> None:
    program = replace(PLAIN, ranks=(PLAIN.ranks[0] + update(2), PLAIN.ranks[1] + update(1)))
    check_program(program)
    assert defect in _defects(_edited(program, 0, edit))


def test_the_update_is_at_the_end_and_in_order() -> None:
    program = replace(PLAIN, ranks=tuple(ops + update(2) for ops in PLAIN.ranks))
    late = _edited(program, 0, ("BW2@0", ""), ("RG0", "RG0 BW2@0"))
    assert _defects(late) == ["rank 0: BW2@0 (operation 12) comes after RG0, which belongs to the update"]
    assert _defects(_edited(program, 0, ("NORM", "OPT0"), ("OPT0 AG0", "NORM AG0"))) == [
        "rank 0: OPT0 comes before NORM"
    ]
    assert _defects(_edited(program, 0, ("OPT0 AG0", "AG0 OPT0"))) == ["rank 0: AG0 comes before OPT0"]
    evaluation = forward_only((0, 1), 2)
    assert (
        "RG0 updates, but the program has no backward pass"
        in _defects(replace(evaluation, ranks=tuple(ops + update(1) for ops in evaluation.ranks)))[0]
    )


def test_broken_programs_are_rejected_or_run() -> None:
    """A dropped or retargeted operation is always found; a swap that is accepted leaves a program that runs."""
    accepted = {"dropped": 0, "retargeted": 0, "swapped": 0}
    count = 300
    for kind, program in broken_programs(seed=3, count=count):
        try:
            check_program(program)
        except ProgramError:
            continue
        accepted[kind] += 1
        simulate(program, Times(hop=0.1, collective=0.1))
    assert accepted["dropped"] == accepted["retargeted"] == 0
    assert 5 <= accepted["swapped"] <= 70  # both happen


def test_the_programs_that_are_broken_are_sound() -> None:
    rng = random.Random(5)
    for _ in range(40):
        check_program(sound_program(rng))
