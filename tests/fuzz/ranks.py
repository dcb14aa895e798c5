"""What a worker process does: one rank of a job, through the same door as under torchrun."""

from __future__ import annotations

import contextlib
import os
import signal
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from pentad.configs.schema import Config
from pentad.trainer.checkpoint.state import units_by_key
from pentad.trainer.job.outputs import Outputs
from pentad.trainer.job.run import run
from pentad.trainer.processes.signals import StopRequest
from pentad.trainer.processes.start import Start
from pentad.trainer.trainer import Trainer


@dataclass(frozen=True)
class Disturbance:
    """What happens to a run.

    Args:
        nudge: seed of a random change of every parameter by one unit in the last place before the first step.
        stop: (rank, step): the rank gets SIGTERM in the step.
    """

    nudge: int | None = None
    stop: tuple[int, int] | None = None


UNDISTURBED = Disturbance()


def train(
    rank: int, world: int, cfg: Config, given: str, port: int, run_id: str, logs: Path, meets: Disturbance
) -> None:
    """One rank of `torchrun … -m pentad.trainer`, after its configuration was loaded.

    Args:
        rank, world: of the job.
        cfg: as `load` gave it for so many ranks.
        given: the job's file.
        port: where rank 0 listens.
        run_id: different for every run on the machine.
        logs: folder for what the ranks print.
        meets: what happens to it.
    """
    facts = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": run_id,
    }
    with (
        mock.patch.dict(os.environ, {key: str(value) for key, value in facts.items()}),
        open(logs / f"rank-{rank}.log", "a", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
        _disturbed(rank, meets),
    ):
        try:
            run(cfg, Start.of(os.environ, StopRequest(), given=given))
        except BaseException as error:
            (logs / f"rank-{rank}.{type(error).__name__}").write_text("".join(traceback.format_exception(error)))
            raise


@contextlib.contextmanager
def _disturbed(rank: int, meets: Disturbance) -> Iterator[None]:
    whole = Trainer.train

    def disturbed(self: Trainer, outputs: Outputs | None, stop: StopRequest) -> bool:
        if meets.nudge is not None:
            _nudge(self, meets.nudge)
        if meets.stop is not None and meets.stop[0] == rank:
            stop = _SignalIn(self, meets.stop[1], stop)
        return whole(self, outputs, stop)

    with mock.patch.object(Trainer, "train", disturbed):
        yield


def _nudge(trainer: Trainer, seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    for unit in units_by_key(trainer.parts.replicas).values():
        up = torch.rand(unit.value.shape, generator=draws) < 0.5
        towards = torch.where(up, torch.inf, -torch.inf).to(unit.value.dtype)
        moved = torch.nextafter(unit.value, towards)
        unit.value.copy_(torch.where(unit.value == 0, unit.value, moved))
    trainer.parts.replicas.sync_params()


class _SignalIn(StopRequest):
    """The run's own request; the process gets SIGTERM when the step begins."""

    def __init__(self, trainer: Trainer, step: int, own: StopRequest) -> None:
        self._trainer, self._step, self._own = trainer, step, own

    @property
    def requested(self) -> bool:  # type: ignore[override]
        if self._trainer.step + 1 == self._step and not self._own.requested:
            signal.raise_signal(signal.SIGTERM)
        return self._own.requested
