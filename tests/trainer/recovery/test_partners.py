"""Partners are on other nodes, apart from what is lost together, and one for each."""

from __future__ import annotations

from collections import Counter

import pytest

from pentad.parallel.comm.mesh import Degrees
from pentad.trainer.recovery.partners import partners


@pytest.mark.parametrize("per_node", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "degrees",
    [
        Degrees(dp=8),
        Degrees(tp=2, pp=2, dp=2),
        Degrees(tp=2, pp=4),
        Degrees(pp=2, cp=2, dp=2),
        Degrees(tp=4, pp=2, dp=2),
        Degrees(pp=4, dp=4, ep=2),
    ],
)
def test_partners_are_elsewhere(degrees: Degrees, per_node: int) -> None:
    world = degrees.world
    nodes = [f"node {slot // per_node}" for slot in range(world)]
    found = partners(nodes, degrees)
    if world == per_node:
        assert found == (None,) * world
        return
    assert sorted(slot for slot in found if slot is not None) == list(range(world))
    assert all(nodes[slot] != nodes[other] for slot, other in enumerate(found) if other is not None)


def test_partners_share_neither_tp_group_nor_pipeline_where_that_can_be() -> None:
    degrees = Degrees(tp=2, pp=2, dp=4)
    found = partners([f"node {slot // 4}" for slot in range(16)], degrees)
    for slot, other in enumerate(found):
        assert other is not None and slot // 2 != other // 2 and slot % 8 != other % 8


def test_of_uneven_nodes_as_many_as_can_be_have_one() -> None:
    found = partners(["a", "a", "a", "b"], Degrees(dp=4))
    assert Counter(slot is not None for slot in found) == {True: 2, False: 2}
    assert found[3] in (0, 1, 2) and 3 in found[:3]
