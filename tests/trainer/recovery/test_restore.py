"""Ranks of any layout are filled from the states of ranks of any other one: the newest step that is whole somewhere."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pentad.parallel.global_tensor import GlobalTensor, Placement
from pentad.trainer.checkpoint.same_run import RunProgress
from pentad.trainer.recovery import restore
from pentad.trainer.recovery.point import RunPoint
from pentad.trainer.recovery.restore import Known, Live, StateRestore
from pentad.trainer.recovery.snapshots import SnapshotFile

SHAPES = {"model/a": (6, 4), "optim/m/a": (6, 4), "model/b": (5,), "model/none": ()}
State = dict[str, GlobalTensor]


def whole(name: str, step: int) -> torch.Tensor:
    """The global tensor after a step."""
    numel = torch.Size(SHAPES[name]).numel()
    return (torch.arange(numel, dtype=torch.float64) + 1000 * step + len(name)).view(SHAPES[name])


def point(step: int) -> RunPoint:
    return RunPoint(RunProgress(step, step, 8 * step, 0))


def cut(draws: random.Random, ranks: int) -> list[dict[str, tuple[int, int]]]:
    """Runs of the elements of each tensor for each rank, together all of it, some of it twice."""
    found: list[dict[str, tuple[int, int]]] = [{} for _ in range(ranks)]
    for name, shape in SHAPES.items():
        numel = torch.Size(shape).numel()
        cuts = sorted(draws.randrange(numel + 1) for _ in range(ranks - 1))
        runs = list(zip((0, *cuts), (*cuts, numel), strict=True))
        for mine, (start, stop) in zip(found, runs, strict=True):
            more = draws.choice((0, 0, numel))
            mine[name] = (max(0, start - more), stop)
    return found


def state(runs: dict[str, tuple[int, int]], step: int | None) -> State:
    """A rank's pieces after a step; none: nothing is in them."""
    found: State = {}
    for name, (start, stop) in runs.items():
        values = torch.full((stop - start,), -1.0, dtype=torch.float64)
        if step is not None:
            values = whole(name, step).reshape(-1)[start:stop].clone()
        found[name] = GlobalTensor(Placement.whole(SHAPES[name]), start, stop, values)
    return found


class Meeting:
    """The ranks of a mesh, as threads."""

    def __init__(self, world: int) -> None:
        self.world, self.bytes = world, 0
        self._barrier = Barrier(world, timeout=30)
        self._found: list[Any] = [None] * world
        self._boxes: dict[tuple[int, int], list[torch.Tensor]] = {}

    def gather(self, rank: int, mine: Any) -> list[Any]:
        self._found[rank] = mine
        self._barrier.wait()
        found = list(self._found)
        self._barrier.wait()
        return found

    def exchange(self, axis: Any, out: dict[int, list[torch.Tensor]], into: dict[int, list[torch.Tensor]]) -> None:
        rank = axis.rank
        self._boxes |= {(rank, to): [each.clone() for each in tensors] for to, tensors in out.items()}
        self._barrier.wait()
        for source, tensors in into.items():
            for here, there in zip(tensors, self._boxes.get((source, rank), []), strict=True):
                here.copy_(there)
        self._barrier.wait()


@dataclass
class Process:
    """One that comes to the new mesh.

    Args:
        number: of it.
        folder: of its node.
        live: what it has in memory.
        begun: as of `Known`.
    """

    number: int
    folder: Path
    live: Live | None = None
    begun: dict[int, int] | None = None


def fill(processes: Sequence[Process], into: list[State], monkeypatch: pytest.MonkeyPatch) -> list[StateRestore]:
    """Lets processes meet as the ranks 0, 1 … of a mesh, and fills each one's state."""
    meeting, members = Meeting(len(into)), [each.number for each in processes]
    monkeypatch.setattr(restore, "exchange", meeting.exchange)
    monkeypatch.setattr(restore, "all_tensors", lambda parts, optimizer: parts)
    monkeypatch.setattr(restore, "begin_anew", lambda stepper: None)

    def one(rank: int) -> StateRestore:
        mine = processes[rank]
        mesh: Any = SimpleNamespace(rank=rank, degrees=SimpleNamespace(world=len(into)))
        mesh.axis = lambda name: SimpleNamespace(rank=rank)
        mesh.gather_objects = lambda found: meeting.gather(rank, found)
        optimizer = SimpleNamespace(loaded=lambda tensors: None)
        stepper: Any = SimpleNamespace(mesh=mesh, parts=into[rank], optimizer=optimizer, updates=torch.zeros(()))
        known = Known(mine.begun or {})
        restoring = StateRestore(mine.folder, mine.number, members, mine.live, known)
        restoring.meet(mesh, None, None)
        restoring.fill(stepper)
        if restoring.point is not None:
            assert stepper.updates.item() == restoring.point.step
        return restoring

    with ThreadPoolExecutor(len(into)) as threads:
        return list(threads.map(one, range(len(into))))


def assert_at(step: int, states: Sequence[State]) -> None:
    for mine in states:
        for name, piece in mine.items():
            start = piece.boxes[0].local_flat_start if piece.boxes else 0
            wanted = whole(name, step).reshape(-1)[start : start + piece.local.numel()]
            assert torch.equal(piece.local, wanted), name


def elements(runs: dict[str, tuple[int, int]]) -> set[tuple[str, int]]:
    return {(name, at) for name, (start, stop) in runs.items() for at in range(start, stop)}


@pytest.mark.parametrize("seed", range(20))
def test_ranks_of_any_layout_are_filled_from_any_other(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some ranks are a step ahead, one is lost and left its copies on its node; what a rank has it keeps."""
    draws = random.Random(seed)
    old, new = draws.randint(2, 5), draws.randint(1, 5)
    before, after = cut(draws, old), cut(draws, new)
    nodes = [tmp_path / "even", tmp_path / "odd"]
    for node in nodes:
        node.mkdir()
    lost, newest = draws.randrange(old), [draws.choice((7, 8)) for _ in range(old)]
    lives: dict[int, Live] = {}
    for number, runs in enumerate(before):
        kept = state(runs, 6)
        file = SnapshotFile(nodes[number % 2], number, kept)
        for step in range(6, newest[number] + 1):
            for name, piece in state(runs, step).items():
                kept[name].local.copy_(piece.local)
            file.write(point(step), 0, number)
        if number != lost:
            lives[number] = Live(point(newest[number]), state(runs, newest[number]), 0, number)
    left = [number for number in range(old) if number != lost]
    draws.shuffle(left)
    numbers = [*left, *range(old, old + new)][:new]
    into = [state(runs, None) for runs in after]
    processes = [Process(number, nodes[number % 2], lives.get(number)) for number in numbers]
    found = fill(processes, into, monkeypatch)

    def held(number: int, step: int) -> set[tuple[str, int]]:
        there = number < old and step in (newest[number], newest[number] - 1)
        return elements(before[number]) if there else set()

    # Copies of those that are not in the mesh are looked at where somebody of it is.
    seen = [number for number in range(old) if number % 2 in {each % 2 for each in numbers}]
    wanted = set[tuple[str, int]]().union(*map(elements, after))
    whole_at = [step for step in (6, 7, 8) if wanted <= set().union(*(held(number, step) for number in seen))]
    if not whole_at:
        assert {each.point for each in found} == {None}
        return
    assert {each.point for each in found} == {point(whole_at[-1])}
    assert {each.furthest for each in found} == {max(newest[number] for number in seen)}
    assert_at(whole_at[-1], into)
    own = [held(number, whole_at[-1]) for number in numbers]
    missing = [len(elements(runs) - mine) for runs, mine in zip(after, own, strict=True)]
    assert [each.taken for each in found] == [8 * each for each in missing]
    assert {each.moved for each in found} == {8 * sum(missing)}


RUNS: dict[str, tuple[int, int]] = {"model/a": (0, 24), "optim/m/a": (0, 24), "model/b": (0, 5), "model/none": (0, 1)}


def test_what_is_nowhere_whole_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the newest step half is lost, of the one before nothing: all go there; else everybody begins anew."""
    first, second = ({**RUNS, "model/a": run} for run in ((0, 11), (11, 24)))
    file = SnapshotFile(tmp_path, 0, kept := state(first, 4))
    file.write(point(4), 0, 0)
    lives = [Live(point(5), state(first, 5), 0, 0), None]
    into = [state(RUNS, None), state(RUNS, None)]
    processes = [Process(number, tmp_path, live) for number, live in enumerate(lives)]
    assert [each.point for each in fill(processes, into, monkeypatch)] == [None, None]
    other = SnapshotFile(tmp_path, 9, state(second, 4))
    other.write(point(4), 0, 1)
    found = fill(processes, into, monkeypatch)
    assert [(each.point, each.furthest) for each in found] == [(point(4), 5)] * 2
    assert_at(4, into)
    assert kept["model/a"].local.numel() == 11


def test_what_was_done_beyond_a_later_meshs_beginning_has_never_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epoch 1 began at step 4; a copy of step 5 of the mesh before is of numbers that nobody has any more."""
    stale = SnapshotFile(tmp_path, 9, state(RUNS, 5))
    stale.write(point(5), 0, 0)
    live = Live(point(4), state(RUNS, 4), 1, 0)
    into = [state(RUNS, None)]
    (found,) = fill([Process(0, tmp_path, live, {0: 0, 1: 4})], into, monkeypatch)
    assert found.point == point(4) and found.taken == 0
    assert_at(4, into)
    (found,) = fill([Process(0, tmp_path, live, {0: 0})], into, monkeypatch)
    assert found.point == point(5)


def test_a_damaged_copy_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the newest step, on a rank that another one would take from it: all go to the step before."""
    file = SnapshotFile(tmp_path, 1, kept := state(RUNS, 6))
    file.write(point(6), 0, 1)
    for name, piece in state(RUNS, 7).items():
        kept[name].local.copy_(piece.local)
    half, _ = file.write(point(7), 0, 1)
    file.file.state(half)[3] ^= 1
    into = [state(RUNS, None), state(RUNS, None)]
    found = fill([Process(5, tmp_path / "elsewhere"), Process(1, tmp_path)], into, monkeypatch)
    assert [(each.point, each.furthest) for each in found] == [(point(6), 7)] * 2
    assert_at(6, into)


def test_the_first_slots_memory_says_what_was_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told, untold = RunPoint(RunProgress(3, 3, 24, 0), {"step": 3, "loss": 1.5}), point(3)
    lives: list[Callable[[], Live]] = [
        lambda: Live(untold, state(RUNS, 3), 0, 1),
        lambda: Live(told, state(RUNS, 3), 0, 0),
    ]
    into = [state(RUNS, None), state(RUNS, None)]
    processes = [Process(number, tmp_path, make()) for number, make in enumerate(lives)]
    assert [each.point for each in fill(processes, into, monkeypatch)] == [told, told]
