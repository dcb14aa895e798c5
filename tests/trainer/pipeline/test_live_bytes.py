"""What is alive on the device after every operation of a real step is what the simulator says."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pentad.configs.schema import Config, HardwareConfig, LogConfig
from pentad.parallel.pipeline.memory import ActivationBytes, bytes_after
from pentad.parallel.pipeline.needs import Kinds
from pentad.parallel.pipeline.program import Op, Program
from pentad.parallel.pipeline.recorded import actual
from pentad.parallel.record.reader import read
from pentad.trainer.metrics.live_bytes import LiveBytes
from tests.distributed import run_distributed
from tests.training import Run, job

RANKS = 4
LAYOUTS: dict[str, dict[str, Any]] = {
    "po-h": {"pipeline": {"schedule": "po-h", "chunks": 2}, "model": {"layers": 8}},
    "po-f": {"pipeline": {"schedule": "po-f", "chunks": 2}, "model": {"layers": 8}},
    "1f1b": {"pipeline": {"schedule": "1f1b", "chunks": 1}, "model": {"layers": 4}, "offload": "all"},
    "gis": {"pipeline": {"schedule": "gis", "chunks": 2}, "model": {"layers": 8}, "offload": 0.5},
}


@dataclass(frozen=True)
class Watched:
    """What one rank saw in a step.

    Args:
        program: of all ranks.
        after: bytes of activations after each operation of its list.
        offloaded: of each stage, bytes of a microbatch that go to the host.
    """

    program: Program
    after: list[int]
    offloaded: dict[int, int]


def _job(name: str, ranks: int = RANKS) -> Config:
    sizes = {"micro_batch": 1, "global_batch": 8, "seq_len": 64, "steps": 2, "pp": ranks}
    # With rates of its own the program is the same however busy the machine is.
    hardware = HardwareConfig(peak_tflops=0.001, host_gib_s=10.0)
    return replace(job(**{**sizes, **LAYOUTS[name]}), log=LogConfig(memory=True), hardware=hardware)


def _kept(name: str) -> Config:
    """The same stages with all activations on the device."""
    cfg = _job(name)
    schedule = "1f1b" if cfg.parallel.pipeline.chunks == 1 else "gis"
    pipeline = replace(cfg.parallel.pipeline, schedule=schedule)
    memory = replace(cfg.memory, offload_activations="none")
    return replace(cfg, parallel=replace(cfg.parallel, pipeline=pipeline), memory=memory)


class _Counting:
    """A rank's live bytes without what is on its way between ranks, noted at every operation."""

    def __init__(self, live: LiveBytes, on_their_way: Callable[[], Iterable[Tensor]]) -> None:
        self.watching, self._count, self._on_their_way = live.watching, live.count, on_their_way
        self._before, self.after = live.count(), []

    def count(self) -> int:
        moving = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in self._on_their_way()}
        self.after.append(self._count() - self._before - sum(moving.values()))
        return self.after[-1]


def _watched(rank: int, world: int, cfg: Config) -> Watched:
    """The second step: what is made once is there."""
    run = Run(rank, cfg)
    try:
        run.step(0)
        stepper, offloaded = run.stepper, dict[int, int]()
        runtime, live = stepper._runtime, stepper.live
        assert live is not None

        def moving() -> Iterable[Tensor]:
            yield from runtime._outputs.values()
            yield from runtime._grads.values()
            yield from (x for queue in runtime._sends.values() for _, x in queue)

        counting = stepper.live = _Counting(live, moving)  # type: ignore[assignment]
        if stepper._copies is not None:
            offloads, start = stepper._copies.offloads, stepper._handlers[Kinds.OFFLOAD]

            def noted(op: Op) -> None:
                offloaded[op.stage] = sum(block.nbytes for block in offloads._saved[op.stage, op.index].blocks)
                start(op)

            stepper._handlers[Kinds.OFFLOAD] = noted
        run.step(1)
        return Watched(run.session.program, counting.after, offloaded)
    finally:
        run.close()


def _sizes(kept: list[Watched], moved: list[Watched]) -> ActivationBytes:
    """The bytes of each stage, read off the run in which all of them stay."""
    activation, deferred = dict[int, int](), dict[int, int]()
    for rank, each in enumerate(kept):
        before = 0
        for op, after in zip(each.program.ranks[rank], each.after, strict=True):
            if op.kind is Kinds.FORWARD and op.index == 0:
                activation[op.stage] = after - before
            elif op.kind is Kinds.INPUT_GRAD and op.index == 0:
                deferred[op.stage] = activation[op.stage] + after - before
            before = after
    stages = range(kept[0].program.stages)
    offloaded = {stage: nbytes for each in moved for stage, nbytes in each.offloaded.items()}
    return ActivationBytes(
        activation=tuple(float(activation[s]) for s in stages),
        deferred=tuple(float(deferred[s]) for s in stages) if deferred else None,
        offloaded=tuple(float(offloaded.get(s, 0)) for s in stages),
    )


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "po-h" else pytest.mark.slow) for name in LAYOUTS]
)
def test_live_bytes_are_those_of_the_simulator_at_every_operation(name: str) -> None:
    kept = run_distributed(_watched, RANKS, _kept(name), group=False)
    moved = run_distributed(_watched, RANKS, _job(name), group=False)
    sizes = _sizes(kept, moved)
    assert min(sizes.offloaded or (0,)) >= 0 and max(sizes.offloaded or (0,)) > 0.8 * min(sizes.activation)
    for ran in (kept, moved):
        planned = bytes_after(ran[0].program, sizes)
        for rank, each in enumerate(ran):
            one = min(sizes.activation)
            for op, real, plan in zip(each.program.ranks[rank], each.after, planned[rank], strict=True):
                assert abs(real - plan) <= 0.02 * max(plan, one), (rank, str(op), real, plan)
    assert max(max(each.after) for each in moved) < 0.8 * max(max(each.after) for each in kept)


def _recorded(rank: int, world: int, cfg: Config, folder: Path) -> Program:
    run = Run(rank, cfg, record=folder / f"rank-{rank}.ring")
    try:
        run.step(0)
        run.step(1)
        return run.session.program
    finally:
        run.close()


@pytest.mark.distributed
def test_the_record_has_the_bytes_after_every_operation(tmp_path: Path) -> None:
    programs = run_distributed(_recorded, 2, _job("gis", 2), tmp_path, group=False)
    curves = actual(programs[0], [read(tmp_path / f"rank-{rank}.ring") for rank in range(2)], 1).held
    for ops, curve in zip(programs[0].ranks, curves, strict=True):
        assert len(curve) == len(ops)
        assert all(before <= after for (before, _), (after, _) in pairwise(curve))
        forward = next(k for k, op in enumerate(ops) if op.kind is Kinds.FORWARD)
        assert curve[forward][1] > 0.9 * max(level for _, level in curve) / len(ops)


def test_storages_are_counted_once_and_while_they_live() -> None:
    live = LiveBytes(torch.device("cpu"))
    outside = torch.ones(1000)
    with live.watching():
        a = torch.ones(100, dtype=torch.float64)
        b, c = a.view(10, 10), outside[:10]
        assert live.count() == 800 and b.shape[0] == len(c)
        d = a + 1
        assert live.count() == 1600
        del a, d
        assert live.count() == 800
        del b
        assert live.count() == 0
