"""What any layout has saved, any other goes on from: the loss of the next step is that of an undisturbed run."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, Literal

import pytest

from pentad.configs.schema import CheckpointConfig, Config, MoeConfig
from pentad.configs.validation.general import validate
from pentad.trainer.checkpoint.checkpointer import Checkpointer
from pentad.trainer.checkpoint.names import step_folder
from pentad.trainer.checkpoint.retention import Retention
from pentad.trainer.data.dataset import open_data
from pentad.trainer.job.outputs import Outputs
from pentad.trainer.metrics.peak import Peak
from pentad.trainer.processes.signals import StopRequest
from pentad.trainer.session import Session
from pentad.trainer.trainer import Trainer
from tests.distributed import run_distributed
from tests.trainer.checkpoint.test_resume import Curve, text_job
from tests.training import make_here

Layout = dict[str, Any]
Pair = tuple[int, int]
"""Numbers of the layout that saves and of the one that loads."""
ZERO1, FSDP2 = {"sharding": "zero1"}, {"sharding": "fsdp2"}
DENSE: list[Layout] = [
    {"dp": 4},
    {"dp": 4, **ZERO1},
    {"dp": 4, "states": 2},
    {"dp": 4, "grads": 2, "states": 4},
    {"dp": 4, **FSDP2},
    {"dp": 4, "params": 2, "grads": 2, "states": 4},
    {"tp": 2, "dp": 2},
    {"tp": 2, "dp": 2, **ZERO1},
    {"tp": 2, "dp": 2, **FSDP2},
    {"tp": 4, **ZERO1},
    {"pp": 2, "dp": 2, **ZERO1},
    {"pp": 4},
    {"pp": 2, "tp": 2},
    {"cp": 2, "dp": 2, **ZERO1},
    {"cp": 2, "pp": 2},
]
EXPERTS: list[Layout] = [
    {"dp": 4},
    {"dp": 4, **ZERO1},
    {"dp": 4, "ep": 2, **ZERO1},
    {"dp": 4, "states": 2, "ep": 2},
    {"pp": 2, "dp": 2, "sharding": "zero2", "ep": 2},
    {"dp": 4, "ep": 4},
    {"tp": 2, "dp": 2, "ep": 4},
    {"tp": 2, "dp": 2, "ep": 2, **ZERO1},
    {"tp": 2, "dp": 2, "etp": 2, **ZERO1},
    {"pp": 2, "dp": 2, "ep": 2, **ZERO1},
    {"cp": 2, "pp": 2, "ep": 2, **ZERO1},
    {"cp": 2, "dp": 2, "ep": 2},
    {"pp": 4},
    {"tp": 2, "pp": 2, "ep": 2},
]
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"layers": 4, "tied": True},
    "experts": {"layers": 4, "moe": MoeConfig(experts=4, top_k=2, ffn=16)},
}
SPACES = {"dense": DENSE, "experts": EXPERTS}
SAVED, RANKS = 2, 4


def _cfg(folder: Path, kind: str, layout: Layout, steps: int) -> Config:
    cfg = text_job(folder, model=MODELS[kind], **layout)
    save = CheckpointConfig(asynchronous=False, final=steps == SAVED)
    return replace(cfg, train=replace(cfg.train, steps=steps), checkpoint=save)


def _run(rank: int, cfg: Config, directory: Path, epoch: int, start: Path | None) -> list[float]:
    """Losses of a job on these ranks, from a checkpoint or from the beginning."""

    def data() -> Any:
        train = cfg.train
        return open_data(cfg.data, seq_len=train.seq_len, vocab=cfg.model.used_vocab, seed=train.seed, progress=False)

    here, world = make_here(rank, cfg), cfg.parallel.ranks
    session = Session.open(cfg, range(world), epoch, here=here, data=data, peak=lambda mesh: Peak(None, ""))
    saver = Checkpointer(
        directory,
        group=session.mesh.checkpoint_group,
        rank=rank,
        world=world,
        keep=Retention(),
        asynchronous=False,
        on_event=lambda _: None,
    )
    curve, trainer = Curve(), Trainer(session, saver, run_dir=directory)
    try:
        if start is not None:
            found = saver.find_resume(start)
            assert found is not None
            trainer.restore(found)
        trainer.train(Outputs(curve, curve), StopRequest())  # type: ignore[arg-type]
        saver.close()
    finally:
        session.close()
    return [row[1] for row in curve.rows]


def save_under(folder: Path, kind: str, layout: Layout) -> Path:
    """The checkpoint of a few steps of one process."""
    _run(0, _cfg(folder, kind, layout, SAVED), folder / "first", 0, None)
    return step_folder(folder / "first", SAVED)


def _pairs(
    rank: int, world: int, folder: Path, kind: str, pairs: list[tuple[int, int]]
) -> dict[tuple[int, int], float]:
    """The loss of the step after the save, for each (layout that saves, layout that loads)."""
    epochs, space = count(), SPACES[kind]
    for one in sorted({one for one, _ in pairs}):
        _run(rank, _cfg(folder, kind, space[one], SAVED), folder / str(one), next(epochs), None)
    found: dict[Pair, float] = {}
    for one, other in pairs:
        start, cfg = step_folder(folder / str(one), SAVED), _cfg(folder, kind, space[other], SAVED + 1)
        (found[one, other],) = _run(rank, cfg, folder / "unused", next(epochs), start)
    return found


def _drawn(kind: str, number: int) -> list[Pair]:
    """A circle over some of the layouts: each saves once and loads once."""
    order = random.Random(kind).sample(range(len(SPACES[kind])), number)
    return list(zip(order, order[1:] + order[:1], strict=True))


CASES = [pytest.param(one, marks=pytest.mark.slow) for one in range(max(map(len, SPACES.values())))]


@pytest.mark.distributed
@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("saves", ["some", *CASES])
def test_the_next_step_after_any_save_is_the_same_under_any_layout(
    tmp_path: Path, kind: str, saves: int | Literal["some"]
) -> None:
    """`saves`: the number of the layout whose checkpoint all load."""
    wanted = _drawn(kind, 2) if saves == "some" else [(saves, other) for other in range(len(SPACES[kind]))]
    for layout in SPACES[kind]:
        assert not validate(_cfg(tmp_path, kind, layout, SAVED), RANKS)
    reference = _run(0, _cfg(tmp_path, kind, {}, SAVED + 1), tmp_path / "alone", 0, None)
    found = run_distributed(_pairs, RANKS, tmp_path, kind, wanted, timeout_s=300, group=False)[0]
    assert len(reference) == SAVED + 1 and set(found) == set(wanted)
    assert {pair: loss for pair, loss in found.items() if loss != pytest.approx(reference[-1], rel=1e-11)} == {}
