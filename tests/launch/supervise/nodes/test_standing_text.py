"""What watchers tell each other of the state of things is read as strictly as a file."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pentad.configs.strict_json import JsonError
from pentad.launch.supervise.ladder import Standing
from pentad.launch.supervise.nodes.decider import NodeReport
from pentad.launch.supervise.nodes.standing_text import Address, Prepared, dump_state, load_state
from pentad.trainer.recovery.plan import EpochPlan
from pentad.trainer.recovery.ways import Way

OWN = Standing(0, (0, 1), ("", ""), rungs=("spare", "shrink"), ways=(Way("", "", 2), Way("shrink", "dp=1", 1)))
THERE = Standing(
    *(3, (0, 5), ("a", "b"), {6: "a", 7: "b"}, 8, 20, 2, ("E: x",), OWN.rungs, OWN.ways, 1),
    coming=frozenset({7}),
    starts=False,
)
ROSTER = [Address("b", "10.0.0.2", 4000)]


def _sent(value: object) -> Any:
    return json.loads(json.dumps(value))


def test_a_node_knows_what_the_deciding_one_knew() -> None:
    assert load_state(_sent(dump_state(THERE, ROSTER)), OWN) == (THERE, ROSTER)
    plan, before = EpochPlan(3, (0, 5), (1,), "x", store="h:1"), EpochPlan(2, (0, 1), (4,), "y")
    for prepared in (Prepared(plan, THERE, {9: "a"}, before), Prepared(plan, THERE)):
        assert Prepared.load(_sent(prepared.dump()), OWN) == prepared
    report = NodeReport(2, frozenset({6, 7}), starts=True, left=1)
    assert NodeReport.load(_sent(report.dump())) == report


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"members": [0]}, "1 members on 2 nodes"),
        ({"way": 2}, "layout 2 of 2"),
        ({"split": 1}, "split 1 of layout 1"),
        ({"spares": [[1]]}, "spares"),
        ({"members": [0, -1]}, "member"),
        ({"nodes": ["a", 1]}, "node"),
    ],
)
def test_what_is_no_standing_is_refused(change: dict[str, object], wrong: str) -> None:
    told = _sent(dump_state(THERE, ROSTER))
    with pytest.raises(JsonError, match=wrong):
        load_state({**told, "standing": {**told["standing"], **change}}, OWN)
    with pytest.raises(JsonError):
        load_state({**told, "roster": [["b", "10.0.0.2"]]}, OWN)
