"""A job's store and torch's groups, stood in for: one process is a rank of a world of any size."""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # the backend "fake"

from pentad.parallel.comm.host_tree import HostTree
from pentad.trainer.checkpoint.team import Answer

_ADDRESS = 200
"""Bytes by which gloo says where a rank listens, about."""
Said = Callable[[int, Any], Any]
"""What a rank says where this one says something."""


@dataclass
class Spent:
    """What a rank did in a part of its life.

    Args:
        calls: of the store, of groups of ranks, and to make groups.
        sent, received: bytes of these.
        sockets: of the groups that were made, each a full mesh, as gloo's are.
        files: that were opened.
        seconds: of this rank's own work.
    """

    calls: int = 0
    sent: int = 0
    received: int = 0
    sockets: int = 0
    files: int = 0
    seconds: float = 0.0


class StandIns:
    """Stands in for what a rank talks to while it is open.

    Args:
        world, rank: of the job, and this process in it.
        node: ranks on a node.
        answer: what other ranks say.
    """

    def __init__(self, world: int, rank: int, node: int, answer: Said) -> None:
        self.world, self.rank, self.node, self.answer = world, rank, node, answer
        self.spent = Spent()
        self.store = StoreOfMany(self)
        self._seconds_of_others = 0.0
        self._open = ExitStack()

    def spend(self, work: Callable[[], object], folder: Path) -> Spent:
        """What `work` takes; files are counted under `folder`."""
        self.spent, self._seconds_of_others = Spent(), 0.0
        _OPENED[:] = [str(folder)]
        begun = time.perf_counter()
        work()
        seconds = time.perf_counter() - begun - self._seconds_of_others
        files = len(_OPENED) - 1
        _OPENED.clear()
        return replace(self.spent, files=files, seconds=seconds)

    def count(self, sent: int = 0, received: int = 0, calls: int = 1) -> None:
        """One more call."""
        self.spent.calls += calls
        self.spent.sent += sent
        self.spent.received += received

    def others(self, mine: Any, ranks: Sequence[int]) -> list[Any]:
        """What these ranks say, this one among them."""
        opened, team = _OPENED[:], isinstance(mine, Answer)
        said = [
            mine if rank == self.rank else Answer(self.answer(rank, mine.result)) if team else self.answer(rank, mine)
            for rank in ranks
        ]
        _OPENED[:] = opened
        return said

    def _whole(self, mine: Any, merge: Callable[[list[Any]], Any]) -> Any:
        """What the first rank comes to; that takes this rank no time."""
        begun = time.perf_counter()
        whole = merge(self.others(mine, range(self.world)))
        self._seconds_of_others += time.perf_counter() - begun
        return whole

    def _neighbours(self, tree: HostTree, mine: Any, merge: Callable[[list[Any]], Any]) -> Iterator[list[bytes]]:
        """What the others of this rank's groups say to it, level by level; that takes it no time."""
        for level in tree.levels:
            begun = time.perf_counter()
            if not level.leads:
                self.count(len(pickle.dumps(mine)) + 8, 8 * len(level.ranks), calls=4)
                return
            stride = level.ranks[1] - level.ranks[0]
            subtrees = (range(first, min(first + stride, self.world)) for first in level.ranks[1:])
            found = [pickle.dumps(merge(self.others(mine, ranks))) for ranks in subtrees]
            self.count(8, sum(map(len, found)) + 8 * len(level.ranks), calls=4)
            self._seconds_of_others += time.perf_counter() - begun
            yield found

    def __enter__(self) -> StandIns:
        real_init, real_group = dist.init_process_group, dist.new_group

        def init(backend: str, **given: Any) -> None:
            self.count()
            given.pop("device_id", None)
            real_init("fake", **given)

        def group(ranks: list[int] | None = None, backend: str | None = None, **given: Any) -> Any:
            members = list(range(self.world)) if ranks is None else list(ranks)
            if backend == "gloo" and self.rank in members:
                self.spent.sockets += len(members) - 1
            self.count()
            kept = {key: value for key, value in given.items() if key in ("group_desc", "use_local_synchronization")}
            return real_group(ranks, backend="fake", **kept)

        def split(split_ranks: list[list[int]], **given: Any) -> Any:
            self.count()
            mine = next((line for line in split_ranks if self.rank in line), None)
            return None if mine is None else real_group(mine, backend="fake", use_local_synchronization=True)

        def gloo(store: dist.Store, rank: int, size: int, _: object) -> None:
            self.spent.sockets += size - 1
            self.count(sent=_ADDRESS, received=_ADDRESS * (size - 1))

        def talk(tree: HostTree, mine: Any, merge: Callable[[list[Any]], Any], _: object, heard: Any = None) -> Any:
            for found in self._neighbours(tree, mine, merge):
                mine = merge([mine, *map(pickle.loads, found)])
            told = mine if self.rank == 0 else self._whole(mine, merge)
            told = told if heard is None else heard(told)
            size = len(pickle.dumps(told))
            for level in tree.levels:
                self.count(size * (len(level.ranks) - 1) if level.leads else 0, 0 if level.leads else size, calls=4)
            return mine if self.rank == 0 else told

        c10d = torch.distributed.distributed_c10d
        for where, name, new in (
            (dist, "init_process_group", init),
            (dist, "new_group", group),
            (dist, "split_group", split),
            (torch.distributed.device_mesh, "new_group", group),
            (torch.distributed.device_mesh, "split_group", split),
            (c10d, "_store_based_barrier", lambda *_, **__: self.count(16, 16, calls=2)),
            (HostTree, "talk", talk),
            (sys.modules["pentad.parallel.comm.host_tree"], "make_gloo", gloo),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "set_device", bool),
            (torch.cuda, "synchronize", bool),
            (sys.modules["pentad.parallel.comm.mesh"], "_connect", bool),
        ):
            self._open.enter_context(patch.object(where, name, new))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


class StoreOfMany(dist.Store):
    """The job's store, in which every other rank has written what this one has, in its place."""

    def __init__(self, stood_in: StandIns) -> None:
        super().__init__()
        self._in, self._kept = stood_in, dict[str, bytes]()

    def set(self, key: str, value: bytes | str) -> None:
        """Of this rank."""
        self._in.count(sent=len(key) + len(value))
        self._kept[key] = value.encode() if isinstance(value, str) else bytes(value)

    def append(self, key: str, value: bytes | str) -> None:
        """The others of the node have done so before."""
        self.set(key, (value if isinstance(value, bytes) else value.encode()) * self._in.node)

    def get(self, key: str) -> bytes:
        """What was set."""
        value = self._kept[key]
        self._in.count(sent=len(key), received=len(value))
        return value

    def add(self, key: str, amount: int) -> int:
        """All others have been here before."""
        self._in.count(sent=len(key) + 8, received=8)
        return 1 if key.rpartition("/")[2] == str(self._in.rank) else self._in.world

    def compare_set(self, key: str, expected: bytes | str, wanted: bytes | str) -> bytes:
        """As of a key that nobody has set."""
        self.set(key, wanted)
        return self._kept[key]

    def check(self, keys: list[str]) -> bool:
        """Everything is there."""
        self._in.count(sent=sum(map(len, keys)), received=1)
        return True

    def wait(self, keys: list[str], timeout: Any = None) -> None:
        """Nothing is waited for."""
        self._in.count(sent=sum(map(len, keys)), received=1)


_OPENED: list[str] = []
"""The folder in which opened files are counted, and these files; empty: none are counted."""


def _audit(event: str, given: tuple[Any, ...]) -> None:
    if event == "open" and _OPENED and isinstance(given[0], str | os.PathLike):
        path = os.fspath(given[0])
        if path.startswith(_OPENED[0]):
            _OPENED.append(path)


sys.addaudithook(_audit)
