"""`reshard` writes, byte for byte, what the ranks of the other layout would have written."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from pentad.launch.cli import main
from pentad.parallel.comm.mesh import DENSE_AXES, EXPERT_AXES
from pentad.trainer.checkpoint.checkpointer import Checkpointer, verify
from pentad.trainer.checkpoint.retention import Retention
from pentad.trainer.checkpoint.state import all_tensors
from pentad.trainer.session import Session
from pentad.trainer.setup import mesh_of, unmet_mesh_of
from tests.distributed import run_distributed
from tests.trainer.checkpoint.test_layout_pairs import MODELS, RANKS, SAVED, SPACES, Layout, save_under
from tests.trainer.checkpoint.test_resume import text_job
from tests.training import make_here

BALANCED: list[Layout] = [{"pp": 2, "tp": 2, "pipeline": {"vocab": "balanced", "schedule": "1f1b"}}]
AXES = (*DENSE_AXES, *EXPERT_AXES, "tp", "data", "tokens", "world", "vocab_head", "ends")


def _words(layout: Layout) -> str:
    """As the command line has them; buckets as small as those of the test jobs."""
    given = {**layout, **layout.get("pipeline", {})}
    pairs = [f"{key}={value}" for key, value in given.items() if key != "pipeline"]
    return ",".join([*pairs, "bucket_mib=0.02", *([] if "sharding" in layout else ["sharding=ddp"])])


def _resaved(rank: int, world: int, folder: Path, kind: str, layouts: Sequence[Layout], first: Path) -> None:
    """Each layout loads the checkpoint and saves it as it is."""
    for number, layout in enumerate(layouts):
        cfg = text_job(folder, model=MODELS[kind], **layout)
        session = Session.open(cfg, range(world), number, here=make_here(rank, cfg))
        saver = Checkpointer(
            folder / f"resaved-{number}",
            group=session.mesh.checkpoint_group,
            rank=rank,
            world=world,
            keep=Retention(),
            asynchronous=False,
            on_event=lambda _: None,
        )
        try:
            tensors = all_tensors(session.parts, session.optimizer)
            state = saver.load(first, tensors)
            saver.save(SAVED, tensors, state)
            saver.wait()
        finally:
            session.close()


def _files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name not in ("manifest.json", "state.json")}


@pytest.mark.distributed
@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("number", [1, pytest.param(None, marks=pytest.mark.slow)], ids=["one", "all"])
def test_the_files_are_those_of_the_other_layout(tmp_path: Path, kind: str, number: int | None) -> None:
    layouts = [*random.Random(kind).sample(SPACES[kind], number or len(SPACES[kind])), *BALANCED]
    first = save_under(tmp_path, kind, {})
    run_distributed(_resaved, RANKS, tmp_path, kind, layouts, first, timeout_s=600, group=False)
    for at, layout in enumerate(layouts):
        target = tmp_path / f"resharded-{at}"
        assert main(["checkpoint", "reshard", str(first), str(target), "--layout", _words(layout)]) == 0
        mine, theirs = _files(target), _files(tmp_path / f"resaved-{at}" / first.name)
        assert mine.keys() == theirs.keys(), layout
        assert [name for name in mine if mine[name] != theirs[name]] == [], layout
        assert verify(target) == []


def _axes(rank: int, world: int, folder: Path, layouts: Sequence[tuple[str, Layout]]) -> list[list[Any]]:
    epochs, found = count(), []
    for kind, layout in layouts:
        cfg = text_job(folder, model=MODELS[kind], **layout)
        here = make_here(rank, cfg)
        mesh = mesh_of(cfg, store=here.store, rank=rank, device="cpu", recorder=here.recorder, epoch=next(epochs))
        found.append([_described(mesh, name) for name in AXES])
        mesh.close()
    return found


def _described(mesh: Any, name: str) -> tuple[int, int, tuple[int, ...]]:
    axis = mesh.axis(name)
    return axis.rank, axis.size, axis.ranks if axis.size > 1 else ()


@pytest.mark.distributed
def test_a_mesh_in_which_nobody_meets_has_the_axes_of_one_that_has_met(tmp_path: Path) -> None:
    layouts = [(kind, layout) for kind in SPACES for layout in SPACES[kind][5::3]]
    layouts += [("dense", layout) for layout in BALANCED]
    found = run_distributed(_axes, RANKS, tmp_path, layouts, group=False)
    for at, (kind, layout) in enumerate(layouts):
        cfg = text_job(tmp_path, model=MODELS[kind], **layout)
        for rank in range(RANKS):
            mesh = unmet_mesh_of(cfg, rank)
            assert [_described(mesh, name) for name in AXES] == found[rank][at], (layout, rank)
