"""Plans reach the processes of a node whole, in order, and are refused where they are none."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from pentad.configs.strict_json import JsonError
from pentad.trainer.recovery.plan import EpochPlan, Membership, end_plans, publish_plan

FIRST = EpochPlan(1, (0, 4, 2, 3), (1,), "rank 1 was killed (signal 9)", 1.7e9, "spare")
SECOND = EpochPlan(
    2,
    (0, 4, 5),
    (2,),
    "rank 2 was killed (signal 9)",
    store="node-2:29500",
    rung="shrink",
    layout="dp=3",
    spares=(3, 6),
)


def test_a_plan_is_read_as_it_was_published(tmp_path: Path) -> None:
    publish_plan(tmp_path, FIRST)
    assert Membership(tmp_path, 0, 4).wait(0, 5.0) == FIRST
    assert [each.name for each in tmp_path.iterdir()] == ["plan.1"]


def test_the_newest_plan_counts(tmp_path: Path) -> None:
    for plan in (FIRST, SECOND):
        publish_plan(tmp_path, plan)
    member = Membership(tmp_path, 0, 4)
    assert member.wait(0, 5.0) == member.wait(1, 5.0) == SECOND
    assert member.wait(2, 0.0) is None
    assert member.store == "node-2:29500"
    assert [member.overtaken(epoch) for epoch in range(3)] == [True, True, False]
    assert [member.members(epoch) for epoch in range(4)] == [(0, 1, 2, 3), FIRST.members, SECOND.members, None]


def test_waiting_ends_with_a_plan_that_comes_later(tmp_path: Path) -> None:
    timer = threading.Timer(0.05, publish_plan, (tmp_path, FIRST))
    timer.start()
    assert Membership(tmp_path, 4, 4).wait(0, 60.0) == FIRST
    timer.join()


def test_waiting_ends_where_no_plan_will_come(tmp_path: Path) -> None:
    member, asked = Membership(tmp_path, 0, 4), [False, False, True]
    assert member.wait(0, 60.0, lambda: asked.pop(0)) is None and not asked
    publish_plan(tmp_path, FIRST)
    end_plans(tmp_path)
    assert member.wait(0, 60.0) is None


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"members": [0, 0]}, "no different processes"),
        ({"members": []}, "has members"),
        ({"lost": [0]}, "among the lost"),
        ({"members": [-1]}, "not between 0"),
        ({"members": [True]}, "not an integer"),
        ({"members": 3}, "not a list"),
        ({"epoch": 0}, "epoch 1 or later"),
        ({"epoch": 2}, "the plan of epoch 2"),
        ({"line": 1}, "not a text"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path: Path, change: dict[str, object], wrong: str) -> None:
    (tmp_path / "plan.1").write_text(json.dumps({**json.loads(FIRST.dump()), **change}))
    with pytest.raises(JsonError, match=wrong):
        Membership(tmp_path, 0, 4).wait(0, 5.0)
