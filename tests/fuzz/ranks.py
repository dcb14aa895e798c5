"""What a worker process does: one rank of a job, through the same door as under torchrun."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from pentad.configs.schema import Config
from pentad.trainer.run import run
from pentad.trainer.state import units_by_key
from pentad.trainer.trainer import Trainer


def train(
    rank: int, world: int, cfg: Config, given: str, port: int, run_id: str, logs: Path, nudge: int | None
) -> None:
    """One rank of `torchrun … -m pentad.trainer`, after its configuration was loaded.

    Args:
        rank, world: of the job.
        cfg: as `load` gave it for so many ranks.
        given: the job's file.
        port: where rank 0 listens.
        run_id: different for every run on the machine.
        logs: folder for what the ranks print.
        nudge: seed of a random change of every parameter by one unit in the last place before the first step.
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
        open(logs / f"rank-{rank}.log", "w", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
        _nudged(nudge) if nudge is not None else contextlib.nullcontext(),
    ):
        run(cfg, given)


@contextlib.contextmanager
def _nudged(seed: int) -> Iterator[None]:
    """Every parameter starts one unit in the last place higher or lower."""
    whole = Trainer.train

    def nudged(self: Trainer, *args: object, **named: object) -> bool:
        draws = torch.Generator().manual_seed(seed)
        for unit in units_by_key(self.parts.replicas).values():
            up = torch.rand(unit.value.shape, generator=draws) < 0.5
            towards = torch.where(up, torch.inf, -torch.inf).to(unit.value.dtype)
            moved = torch.nextafter(unit.value, towards)
            unit.value.copy_(torch.where(unit.value == 0, unit.value, moved))
        self.parts.replicas.publish()
        return whole(self, *args, **named)  # type: ignore[arg-type]

    with mock.patch.object(Trainer, "train", nudged):
        yield
