"""Faults, brought into one rank of a real job: at its n-th communication of a step, in its data, in its writer; in its
passes or in its transfers, where it is only to be slow."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = {
    "kill": "killed",
    "stop": "stopped",
    "gil": "frozen",
    "hang": "hang",
    "data livelock": "data livelock",
    "slow data": "data stall",
    "skip": "skipped collective",
    "size": "other size",
    "receive": "receive without send",
    "writer": "checkpoint",
    "slow 1.1": "compute",
    "slow 1.3": "compute",
    "slow 2": "compute",
    "slow link": "network",
}
"""A fault, and what the watcher, or of a slow rank the readings, are to call it."""
SLOW = ("slow 1.1", "slow 1.3", "slow 2", "slow link")
"""Nobody dies of these: the job goes on, and says whom it waits for."""
PAUSE = "pause"
"""Saves that take two seconds: no fault."""
GLOBAL_BATCH = 8
"""Sequences of a step."""
_LONG_S = 600.0
_PASSES_S = 0.6
"""What the passes of a step wait in every rank of a job with a slow one: on a machine with fewer cores than ranks the
time of real passes is chance."""
_LINK_S = 0.15
"""What the copies of a step over a slow link take longer, in each direction."""
_SKIPPED = ("all_gather", "reduce_scatter", "all_reduce")
"""Collectives without which a rank can go on, with wrong numbers of the right shape."""


@dataclass(frozen=True)
class Fault:
    """What happens to a rank.

    Args:
        kind: of `KINDS`, or `PAUSE`.
        rank: the victim.
        step: in which it happens (0-based).
        call: at which of the step's communications.
        mark: a file that then has the time.
        peer: the rank at the other end of a slow link.
    """

    kind: str
    rank: int
    step: int
    call: int
    mark: str
    peer: int = -1

    def touches(self, rank: int) -> bool:
        """Whether something is to be done in a rank's process."""
        passes = self.kind in SLOW and self.kind != "slow link"
        return passes or rank in (self.rank, self.peer)


def inject(fault: Fault, rank: int) -> None:
    """Prepares the fault in this process, that of a rank which it touches."""
    once = threading.Lock()

    def begin() -> bool:
        if not once.acquire(blocking=False):
            return False
        Path(fault.mark).write_text(str(time.time()))
        return True

    if fault.kind in ("slow data", "data livelock"):
        _in_data(fault, begin)
    elif fault.kind == "writer":
        _in_writer(begin)
    elif fault.kind == "slow link":
        _in_link(fault.peer if rank == fault.rank else fault.rank, begin)
    elif fault.kind in SLOW:
        _in_passes(float(fault.kind.split()[1]) if rank == fault.rank else 1.0, begin)
    elif fault.kind == PAUSE:
        _in_writer(lambda: True, 2.0, "write")
    else:
        _in_communication(fault, begin)


def _in_data(fault: Fault, begin: Callable[[], bool]) -> None:
    from pentad.trainer.data.dataset import Split

    read = Split.read

    def late(self: Split, samples: Any, *args: Any) -> Any:
        if samples[0] // GLOBAL_BATCH >= fault.step and begin():
            until = time.monotonic() + _LONG_S
            while time.monotonic() < until:
                if fault.kind == "slow data":
                    time.sleep(_LONG_S)
        return read(self, samples, *args)

    Split.read = late  # type: ignore[method-assign]


def _in_writer(begin: Callable[[], bool], seconds: float = _LONG_S, only: str = "") -> None:
    from pentad.trainer.checkpoint.team import Team

    talk = Team._talk

    def stuck(self: Team, what: str, fn: Callable[[], Any], *how: Any) -> Any:
        def slow() -> Any:
            beside = threading.current_thread() is not threading.main_thread()
            if (fn.__name__ == only if only else beside) and begin():
                time.sleep(seconds)
            return fn()

        return talk(self, what, slow, *how)

    Team._talk = stuck  # type: ignore[method-assign]


def _in_passes(factor: float, begin: Callable[[], bool]) -> None:
    """Every pass also waits, as for a device, and takes `factor` times as long as it would: what the thread computes,
    and what it waits for a core, as on a machine with fewer cores than ranks it does for as long again."""
    from pentad.trainer import step as trainer_step
    from pentad.trainer.metrics.rows import open_schedule, queued_ns

    execute, schedule = trainer_step.execute, open_schedule()

    def slow(ops: Any, handlers: Any, *rest: Any) -> None:
        wait = _PASSES_S / sum(op.kind.computes for op in ops)

        def taking(handler: Callable[[Any], None]) -> Callable[[Any], None]:
            def run(op: Any) -> None:
                begun, queued = time.thread_time(), queued_ns(schedule)
                handler(op)
                own = time.thread_time() - begun + (queued_ns(schedule) - queued) / 1e9
                time.sleep(wait + (factor - 1) * (wait + own))

            return run

        if factor > 1:
            begin()
        execute(ops, {kind: taking(each) if kind.computes else each for kind, each in handlers.items()}, *rest)

    trainer_step.execute = slow  # type: ignore[assignment]


def _in_link(peer: int, begin: Callable[[], bool]) -> None:
    """What comes from `peer` takes longer on its way: so much that a step loses the same over any link."""
    from pentad.parallel.comm.processes import Process
    from pentad.trainer.step import Stepper

    read, run = Process.read, Stepper.run
    copies = {"now": 0, "before": 0}

    def slow(self: Process, *args: Any) -> None:
        if self.rank == peer:
            copies["now"] += 1
            if copies["before"]:
                time.sleep(_LINK_S / copies["before"])
        read(self, *args)

    def step(self: Stepper, *args: Any, **named: Any) -> Any:
        begin()
        copies.update(before=copies["now"], now=0)
        return run(self, *args, **named)

    Process.read = slow  # type: ignore[method-assign]
    Stepper.run = step  # type: ignore[method-assign]


def _in_communication(fault: Fault, begin: Callable[[], bool]) -> None:
    import torch

    from pentad.parallel.comm import collectives

    copied = collectives._copied
    seen = {"step": -1, "calls": 0}
    collective = fault.kind in ("skip", "size")

    def faulty(kind: str, axis: Any, x: torch.Tensor, start: Any, peer: int = -1) -> Any:
        step = axis.recorder.step
        if step != seen["step"]:
            seen.update(step=step, calls=0)
        own = axis.recorder._origin is None and axis.recorder.op >= 0 and (kind in _SKIPPED or not collective)
        seen["calls"] += own
        if not own or step < fault.step or seen["calls"] <= fault.call or not begin():
            return copied(kind, axis, x, start, peer)
        if fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault.kind == "gil":
            until = time.monotonic() + _LONG_S
            while time.monotonic() < until:  # a signal ends sleep
                ctypes.PyDLL(None).sleep(int(_LONG_S))
        elif fault.kind == "hang":
            time.sleep(_LONG_S)
        elif fault.kind == "skip":
            return collectives.Handle(x[: len(x) // axis.size].clone() if kind == "reduce_scatter" else x)
        elif fault.kind == "size":
            other = torch.zeros(2 * x.numel(), dtype=x.dtype)
            getattr(collectives, kind)(other[: len(other) // axis.size] if kind == "all_gather" else other, axis).wait()
        elif fault.kind == "receive":
            other = (axis.rank + 1) % axis.size
            collectives.receive(torch.zeros(8), axis, other).wait()
        return copied(kind, axis, x, start, peer)

    collectives._copied = faulty
