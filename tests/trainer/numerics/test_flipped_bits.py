"""Bits that flip in guarded memory are found before the update that would use them, and rank and place are named."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pentad.configs.schema import Config
from pentad.trainer.job.outputs import Outputs
from pentad.trainer.metrics.sinks import EventLog, SinkSet
from pentad.trainer.numerics.corrupted import CorruptedError
from pentad.trainer.processes.signals import StopRequest
from tests.distributed import run_distributed
from tests.trainer.numerics.flips import KINDS, Flip, Told, flip_state, flipping, train_with_flip
from tests.training import job, open_trainer, world_of

GUARDED: dict[str, Any] = {"steps": 3, "dtype": "bf16"}
STATE: dict[str, Any] = {"numerics": {"replicas_every": 1, "checksums": True}}
PARTS: dict[str, Any] = {"numerics": {"recompute": True}, "recompute": "full"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2-dp2-zero1": {"tp": 2, "dp": 2, "sharding": "zero1"},
    "dp2-pp2-ddp": {"dp": 2, "pp": 2, "sharding": "ddp"},
}
CASES = [(kind, layout, seed) for seed in range(4) for layout in LAYOUTS for kind in KINDS]


@pytest.mark.distributed
@pytest.mark.sample(6)
@pytest.mark.parametrize(("kind", "layout", "seed"), CASES)
def test_a_flipped_bit_is_found_and_its_place_named(kind: str, layout: str, seed: int) -> None:
    cfg = job(**LAYOUTS[layout], **GUARDED, **(PARTS if kind == "recomputed" else STATE))
    flip = Flip.draw(seed, kind, world_of(cfg), cfg.train.steps)
    ranks: list[Told] = run_distributed(train_with_flip, world_of(cfg), cfg, flip, group=False)
    flipped = ranks[flip.rank].flipped
    assert flipped is not None
    assert {told.step for told in ranks} == {flip.step}
    assert {told.found for told in ranks} == {ranks[0].found}
    found = ranks[0].found
    assert found is not None
    # What is recomputed has no name but its number in its layer.
    named = [(place.rank, place.what, place.name.split(" of ")[-1]) for place in found.places]
    assert named == [(flip.rank, flipped.what, flipped.name)]


COPIES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "dp4-ddp": ("parameter", {"dp": 4}, False),
    "dp4-zero1": ("parameter", {"dp": 4, "sharding": "zero1"}, False),
    "tp4": ("copied", {"tp": 4}, False),
    "tp2-dp2-fsdp": ("copied", {"tp": 2, "dp": 2, "sharding": "fsdp2"}, True),
    "dp2": ("parameter", {"dp": 2}, True),
    "pp2-tied": ("copied", {"pp": 2, "model": {"tied": True}}, True),
}
"""What flips, the layout, and whether there are two copies, of which both are suspects."""


@pytest.mark.distributed
@pytest.mark.sample(3)
@pytest.mark.parametrize("layout", COPIES)
def test_the_rank_whose_copy_differs_is_named_without_checksums(layout: str) -> None:
    kind, degrees, two = COPIES[layout]
    cfg = job(**degrees, steps=4, global_batch=16, numerics={"replicas_every": 2})
    # The copies are compared in steps 0 and 2. Under zero1 a copy lasts until the next gather of what it is of.
    flip = Flip(kind, world_of(cfg) - 1, 2 if cfg.parallel.data.sharding == "zero1" else 1, 3)
    ranks: list[Told] = run_distributed(train_with_flip, world_of(cfg), cfg, flip, group=False)
    flipped, found = ranks[flip.rank].flipped, ranks[0].found
    assert flipped is not None and found is not None
    assert {told.step for told in ranks} == {2}
    assert {told.found for told in ranks} == {found}
    assert found.good == 0
    assert found.undecided == two
    assert len(found.places) == 1 + two
    assert {place.name for place in found.places} == {flipped.name}
    assert flip.rank in {place.rank for place in found.places}


def _whole_run(rank: int, world: int, cfg: Config, flip: Flip, folder: str, at_rest: bool) -> str:
    """What ends a run with a checkpoint after every step. `at_rest`: it flips between the step and the checkpoint."""
    session, trainer = open_trainer(rank, cfg, Path(folder))
    run = trainer.stepper.run

    def stepped(step: int, *args: Any, **given: Any) -> Any:
        if (rank, step) != (flip.rank, flip.step):
            return run(step, *args, **given)
        if at_rest:
            result = run(step, *args, **given)
            flip_state(session, flip.kind, random.Random(flip.seed))
            return result
        with flipping(session, flip, []):
            return run(step, *args, **given)

    trainer.stepper.run = stepped  # type: ignore[method-assign]
    outputs = Outputs(SinkSet([]), EventLog(Path(folder) / "events.jsonl")) if rank == 0 else None
    try:
        with pytest.raises(CorruptedError) as error:
            trainer.train(outputs, StopRequest())
    finally:
        trainer.checkpointer.close()
        session.close()
    return str(error.value)


@pytest.mark.distributed
@pytest.mark.parametrize("at_rest", [False, True])
def test_a_run_ends_with_one_line_that_names_the_place_and_the_checkpoint_from_before(
    tmp_path: Path, at_rest: bool
) -> None:
    cfg = job(dp=2, steps=5, model={"vocab": 320}, numerics={"checksums": True})
    cfg = replace(cfg, checkpoint=replace(cfg.checkpoint, every=1))
    lines = run_distributed(_whole_run, 2, cfg, Flip("moment", 1, 3, 0), str(tmp_path), at_rest, group=False)
    assert lines[0] == lines[1]
    assert "\n" not in lines[0]
    when, last = ("after step 4, before saving", 4) if at_rest else ("in step 4 before its update", 3)
    assert f"found {when}: exp_avg" in lines[0] and "on rank 1 (" in lines[0]
    assert f"changed between the update of step {last} and the update of step {last + 1}" in lines[0]
    # What is saved was looked at before: the checkpoint after step 3 is good, one after step 4 was not written.
    assert "after step 3 was the last found good" in lines[0]
    assert f"checkpoint.resume={tmp_path}/checkpoints/step-00000003" in lines[0]
    assert max(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == "step-00000003"
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    (event,) = [event for event in events if event["event"] == "numerics"]
    assert (event["rank"], event["step"], event["good_step"]) == (1, 4 + at_rest, 3)
