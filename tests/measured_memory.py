"""What a step of a job really holds, rank by rank, to compare the memory model with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from pentad.configs.schema import Config
from pentad.models.moe import Moe
from pentad.parallel.comm import slab
from pentad.parallel.comm.host_memory import HostMemory
from pentad.parallel.pipeline.program import Program
from pentad.trainer.memory.estimate import GIB, Memory, per_rank
from pentad.trainer.memory.plan import MARGIN, decided
from tests.distributed import run_distributed
from tests.peak_bytes import PeakBytes
from tests.training import Run, world_of


@dataclass(frozen=True)
class Measured:
    """Of one rank.

    Args:
        place: on the pipeline axis.
        peak: most bytes of live tensors in a step.
        host: bytes that stood for the host's.
        routed: (layer, microbatch) → rows of the rank's experts, and rows that its tokens sent.
        program: of the step.
        made: where the storages of the peak were made, in bytes.
    """

    place: int
    peak: int
    host: int
    routed: dict[tuple[int, int], tuple[int, int]]
    program: Program
    made: Counter[str]


class _Counting:
    """A dispatcher that remembers how many rows go where."""

    def __init__(self, inner: Any, layer: int, found: dict[tuple[int, int], tuple[int, int]]) -> None:
        self._inner, self._layer, self._found = inner, layer, found
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []
        self.fixed_width, self.rows = inner.fixed_width, inner.rows

    def __call__(self, x: Tensor, routing: Any, experts: Callable[..., Tensor], beside: Any) -> Any:
        # A layer that runs again has the same findings.
        if id(routing.findings) not in self._seen:
            self._seen[id(routing.findings)] = len(self._seen)
            self._kept.append(routing.findings)
        key = self._layer, self._seen[id(routing.findings)]
        sent = int((routing.experts >= 0).sum())
        self._found[key] = 0, sent

        def counted(rows: Tensor, groups: Any, weights: Tensor | None) -> Tensor:
            self._found[key] = self._found[key][0] + sum(groups.counts), sent  # once for each chunk
            return experts(rows, groups, weights)

        return self._inner(x, routing, counted, beside)


def measure(rank: int, world: int, cfg: Config, named: bool = False) -> Measured:
    """The second step of a job on one rank; the first one has made what stays."""
    run = Run(rank, cfg)
    try:
        run.step(0)
        copies = run.stepper._copies
        slabs = _host_tensors(copies.offloads) if copies is not None else []
        routed: dict[tuple[int, int], tuple[int, int]] = {}
        for module in run.parts.model.modules():
            if isinstance(module, Moe):
                module.dispatch = _Counting(module.dispatch, module.router.index, routed)
        batches, valid = run.batches(1)
        live = PeakBytes(slabs, named=named)
        states = [x for unit in run.optimizer.states.values() for x in unit.values()]
        live.see(*run.parts.model.parameters(), *states, *run.stepper._runtime._buffers.values())
        for index in range(run.parts.replicas.buckets):
            live.see(*(x for unit in run.parts.replicas.units(index) for x in (unit.value, unit.grad)))
        with live, _host_memory_left_out(live):
            run.stepper.run(1, batches, valid, cfg.optim.lr)
        host = copies.offloads.host_bytes if copies is not None else 0
        return Measured(run.mesh.axis("pp").rank, live.peak, host, routed, run.stepper.program, live.at_peak)
    finally:
        run.close()


@contextmanager
def _host_memory_left_out(live: PeakBytes) -> Iterator[None]:
    """What experts with more rows than before get on the host during the step."""

    class LeftOut(HostMemory):
        def __init__(self, nbytes: int, *, pinned: bool) -> None:
            with _disable_current_modes():
                super().__init__(nbytes, pinned=pinned)
            live.leave_out(self.tensor)

    with mock.patch.object(slab, "HostMemory", LeftOut):
        yield


def _host_tensors(offloads: Any) -> list[Tensor]:
    return [memory.tensor for memory in (*(s.memory for s in offloads._slabs.values()), *offloads._shared._all())]


@dataclass(frozen=True)
class Compared:
    """The rank of each pipeline place of which most was measured, beside what the model says of it."""

    measured: Measured
    predicted: Memory

    @property
    def error(self) -> float:
        """Relative; positive where the model says too much."""
        return self.predicted.tensors / self.measured.peak - 1


def compare(cfg: Config, *, named: bool = False) -> list[Compared]:
    """Measures a job, and asks the model, which is given each rank's own rows of experts."""
    ranks = run_distributed(measure, world_of(cfg), cfg, named, group=False)
    found = []
    for place in range(cfg.parallel.pp):
        most = max((each for each in ranks if each.place == place), key=lambda each: each.peak)
        found.append(Compared(most, per_rank(cfg, most.routed, program=most.program)[place]))
    return found


def most_bytes(cfg: Config) -> int:
    """What the memory model says of the rank that needs most."""
    return max(memory.total for memory in per_rank(cfg))


def check_that_the_plan_fits(cfg: Config) -> None:
    """What is chosen for a job with a limit of its devices keeps within it, as predicted and when it is run."""
    chosen, limit = decided(cfg), GIB * (cfg.hardware.memory_gib or 0.0)
    assert chosen.memory.plan and most_bytes(chosen) <= MARGIN * limit
    for each in compare(chosen):
        assert each.measured.peak <= limit, (each.measured.place, each.predicted, cfg)
