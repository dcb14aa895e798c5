"""Who goes on after a fault, and when nobody does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pentad.configs import load
from pentad.launch.supervise.ladder import Fault, Standing, climb, grown, met_anew
from pentad.parallel.record.diagnosis import DEADLOCK, FAILED, HANG, KILLED, LINK, LOST_NODE, STOPPED, Verdict
from pentad.trainer.recovery.ways import Way, relaid_for, ways

FOUR = Standing(0, (0, 1, 2, 3), ("a", "a", "b", "b"), {4: "a", 5: "b"}, 6)


def _found(kind: str, *slots: int, step: int = 20, **more: object) -> Fault:
    return Fault(Verdict(kind, slots, f"rank {slots} was {kind}", at=7.0), step=step, **more)  # pyright: ignore


def test_a_spare_of_the_same_node_takes_the_slot_and_no_other_slot_changes() -> None:
    rung = climb(FOUR, _found(KILLED, 2))
    assert rung.plan is not None and rung.why == ""
    assert (rung.plan.epoch, rung.plan.members, rung.plan.lost, rung.plan.rung) == (1, (0, 1, 5, 3), (2,), "spare")
    assert (rung.plan.seen, rung.plan.line) == (7.0, "rank (2,) was killed")
    assert rung.standing.spares == {4: "a"} and rung.started == {}
    # The spare of the other node stays there: a new process is started on this one.
    second = climb(rung.standing, _found(STOPPED, 2, step=30))
    assert second.plan is not None and second.plan.members == (0, 1, 6, 3) and second.plan.lost == (5,)
    assert second.plan.rung == "respawn" and second.started == {6: "b"}
    third = climb(second.standing, _found(HANG, 0, step=40))
    assert third.plan is not None and third.plan.members == (4, 1, 6, 3) and third.plan.rung == "spare"
    assert third.standing.next_number == 7 and third.standing.spares == {}


def test_several_at_once_and_those_that_went_beside_the_blamed() -> None:
    rung = climb(FOUR, _found(KILLED, 0, 3, gone={1}))
    assert rung.plan is not None and rung.plan.members == (4, 6, 2, 5) and rung.plan.lost == (0, 1, 3)
    assert rung.started == {6: "a"} and rung.plan.rung == "respawn"


def test_a_broken_connection_replaces_nobody() -> None:
    rung = climb(FOUR, _found(LINK, 1, 2))
    assert rung.plan is not None and rung.plan.members == FOUR.members and rung.plan.lost == ()
    assert rung.plan.rung == "rejoin" and rung.plan.epoch == 1


def test_a_lost_node_needs_spares_elsewhere() -> None:
    standing = replace(FOUR, spares={4: "a", 5: "b", 6: "a"}, next_number=7)
    rung = climb(standing, _found(LOST_NODE, 2, 3))
    assert rung.plan is not None and rung.plan.members == (0, 1, 4, 6)
    ended = climb(FOUR, _found(LOST_NODE, 2, 3))
    assert ended.plan is None and "node" in ended.why


@pytest.mark.parametrize(
    "found",
    [
        _found(DEADLOCK, 0),
        _found("other size", 1),
        _found(FAILED, 1, step=0, lines={1: "ValueError: a shape"}),
        _found(FAILED, 1, lines={1: "error: train.steps"}, user=True),
        _found(FAILED, 1, lines={1: "E: x", 3: "E: x"}, gone={1, 3}),
    ],
    ids=["deadlock", "desync", "first step", "user", "alike"],
)
def test_what_a_new_process_cannot_mend_ends_the_job(found: Fault) -> None:
    rung = climb(FOUR, found)
    assert rung.plan is None and rung.why and rung.standing == FOUR


def test_an_own_error_is_mended_once_and_not_if_it_comes_again_in_its_step() -> None:
    error = {"lines": {1: "RuntimeError: bad device"}, "gone": {1}}
    first = climb(FOUR, _found(FAILED, 1, step=3, **error))
    assert first.plan is not None
    assert climb(first.standing, _found(FAILED, 1, step=3, **error)).plan is None
    assert climb(first.standing, _found(FAILED, 1, step=4, **error)).plan is not None, "a step was done between them"


def test_faults_without_progress_are_a_crash_loop_and_progress_forgets_them() -> None:
    standing = FOUR
    for _ in range(3):
        rung = climb(standing, _found(KILLED, 0, step=8))
        assert rung.plan is not None
        standing = rung.standing
    assert standing.epoch == 3
    assert climb(standing, _found(KILLED, 0, step=8)).plan is None
    assert climb(standing, _found(KILLED, 0, step=9)).plan is not None


# Other layouts ----------------------------------------------------------------------------------------------------

WAYS = (Way("", "", 4), Way("shrink", "dp=2", 2), Way("shrink", "dp=1", 1), Way("layouts", "tp=3 dp=1", 3, block=3))


def _shrinking(*rungs: str, **more: object) -> Standing:
    return replace(FOUR, nodes=("a",) * 4, spares={}, rungs=rungs, ways=WAYS, **more)  # pyright: ignore


def test_without_a_ready_spare_the_mesh_shrinks_and_who_is_left_over_waits() -> None:
    standing = _shrinking("spare", "shrink", "respawn", next_number=7)
    coming = replace(standing, spares={6: "a"}, coming=frozenset({6}))
    for before in (standing, coming):
        rung = climb(before, _found(KILLED, 1))
        assert rung.plan is not None and rung.started == {}
        assert (rung.plan.members, rung.plan.lost, rung.plan.rung) == ((0, 2), (1,), "shrink")
        assert rung.plan.layout == "dp=2" and rung.plan.spares == (3, *before.spares)
        assert rung.standing.way == 1 and rung.standing.spares == {3: "a", **before.spares}
    ready = climb(replace(standing, spares={6: "a"}), _found(KILLED, 1))
    assert ready.plan is not None and ready.plan.rung == "spare" and ready.plan.layout == ""


def test_a_job_grows_with_those_that_are_ready_and_not_before() -> None:
    shrunk = climb(_shrinking("spare", "shrink"), _found(KILLED, 1)).standing
    assert grown(shrunk) is None
    coming = replace(shrunk, spares={**shrunk.spares, 6: "a"}, coming=frozenset({6}))
    assert grown(coming) is None
    rung = grown(replace(coming, coming=frozenset()))
    assert rung is not None and rung.plan is not None and rung.plan.members == (0, 2, 3, 6)
    assert (rung.plan.epoch, rung.plan.lost, rung.plan.rung, rung.plan.layout) == (2, (), "grow", "")
    assert rung.standing.way == 0 and rung.standing.spares == {} and rung.standing.step == shrunk.step
    again = met_anew(shrunk)
    assert again.plan is not None and again.plan.members == shrunk.members and again.plan.layout == "dp=2"


def test_the_rungs_are_tried_in_their_order() -> None:
    first = climb(_shrinking("respawn", "shrink"), _found(KILLED, 1))
    assert first.plan is not None and first.plan.rung == "respawn" and first.plan.layout == ""
    # Processes that do not come up leave the rungs behind.
    second = climb(_shrinking("respawn", "shrink", starts=False), _found(KILLED, 1))
    assert second.plan is not None and second.plan.rung == "shrink"
    third = climb(_shrinking("layouts", "shrink"), _found(KILLED, 1))
    assert third.plan is not None and (third.plan.layout, third.plan.members) == ("tp=3 dp=1", (0, 2, 3))
    last = climb(_shrinking("shrink"), _found(KILLED, 0, 1, 2, 3))
    assert last.plan is None and "shrink" in last.why


def test_a_shrunk_mesh_shrinks_again_and_a_spare_joins_it() -> None:
    once = climb(_shrinking("shrink"), _found(KILLED, 1)).standing
    twice = climb(once, _found(KILLED, 0, step=30))
    assert twice.plan is not None and (twice.plan.members, twice.plan.layout) == ((3, 2), "dp=2")
    thrice = climb(twice.standing, _found(KILLED, 1, step=40))
    assert thrice.plan is not None and (thrice.plan.members, thrice.plan.layout) == ((3,), "dp=1")


def test_the_layers_are_split_over_those_that_are_left() -> None:
    """8 layers and a balanced vocabulary: any of 3 stages may be the one with 2 layers."""
    given = [
        "model.layers=8",
        "model.hidden=32",
        "model.heads=4",
        "model.kv_heads=4",
        "model.ffn=48",
        "model.vocab=264",
    ]
    given += ["parallel.pp=4", "parallel.dp=1", "train.global_batch=8", "train.micro_batch=1", "train.seq_len=16"]
    given += ["parallel.pipeline.vocab=balanced", "faults.recover=true", "train.steps=2", "train.device=cpu"]
    cfg = load(None, given)
    four = Standing(0, (0, 1, 2, 3), ("a",) * 4, next_number=4, rungs=("resplit",), ways=ways(cfg), starts=False)
    for lost, layers, members in (
        (0, "3,3,2", (1, 2, 3)),
        (1, "3,3,2", (0, 2, 3)),
        (2, "2,3,3", (0, 1, 3)),
        (3, "2,3,3", (0, 1, 2)),
    ):
        rung = climb(four, _found(KILLED, lost))
        assert rung.plan is not None and (rung.plan.rung, rung.plan.members) == ("resplit", members)
        assert rung.plan.layout == f"pp=3 dp=1 pipeline.layers=[{layers}]" == rung.standing.layout
        assert relaid_for(cfg, rung.plan.layout, 3).parallel.pipeline.layers == tuple(map(int, layers.split(",")))
        back = grown(replace(rung.standing, spares={7: "a"}))
        assert back is not None and back.plan is not None and (back.plan.layout, back.plan.rung) == ("", "grow")
        assert set(back.plan.members) == {*members, 7} and back.plan.members[0] == members[0]
        again = climb(rung.standing, _found(KILLED, 1, step=30))
        assert again.plan is not None and again.plan.layout == "pp=2 dp=1 pipeline.layers=[4,4]"


def test_a_schedule_that_needs_its_ranks_leaves_the_next_rung() -> None:
    ended = climb(replace(FOUR, rungs=("resplit",), spares={}, ways=(Way("", "", 4, 4),)), _found(KILLED, 1))
    assert ended.plan is None and "nothing on the ladder (resplit)" in ended.why
