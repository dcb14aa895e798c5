"""What hosts say to each other through a tree is what they would say all to all, with groups of any size."""

from __future__ import annotations

from typing import Any

import pytest

from pentad.parallel.comm import host_tree as trees
from pentad.parallel.comm.host_tree import HostTree, Unsaid, joined, leftmost, wait_blocking
from tests.distributed import host_tree, run_distributed

pytestmark = pytest.mark.distributed


def _says(rank: int, world: int, fan: int) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trees, "FAN", fan)
        tree = host_tree()
        found = {
            "all": tree.talk([f"{rank}" * (rank + 1)], joined, wait_blocking),
            "first": tree.talk([rank], joined, wait_blocking, lambda _: []),
            "least": tree.talk(rank + 1, min, wait_blocking),
            "leftmost": tree.talk(rank, leftmost, wait_blocking),
            "sizes": [len(level.ranks) for level in tree.levels],
        }
        found["wrong"] = _wrong(tree, rank, world)
        found["after"] = tree.talk(rank, max, wait_blocking)
        return found


def _wrong(tree: HostTree, rank: int, world: int) -> str:
    """The last rank says what cannot be pickled."""
    with pytest.raises(Unsaid) as error:
        tree.talk([lambda: None] if rank == world - 1 else [], joined, wait_blocking)
    return str(error.value)


@pytest.mark.parametrize(("world", "fan"), [(5, 16), (5, 2), (4, 2), (5, 3)])
def test_all_hear_what_all_said_and_what_one_could_not_say(world: int, fan: int) -> None:
    found = run_distributed(_says, world, fan)
    everything = [f"{rank}" * (rank + 1) for rank in range(world)]
    for rank, each in enumerate(found):
        assert each["all"] == everything and each["first"] == ([] if rank else list(range(world)))
        assert (each["least"], each["leftmost"], each["after"]) == (1, 0, world - 1)
        assert each["wrong"].startswith(f"rank {world - 1}: ") and max(each["sizes"]) <= fan
