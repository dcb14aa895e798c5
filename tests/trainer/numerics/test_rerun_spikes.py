"""Spikes are held back, run again and named; what follows is what the config says, in every layout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from pentad.configs.schema import TextData
from pentad.models.sequences import Inputs
from pentad.parallel.comm.collectives import all_reduce
from pentad.trainer.data.dataset import Microbatch
from pentad.trainer.inputs import InputMaker
from pentad.trainer.metrics.readings.protocol import RunFacts, StepDone
from pentad.trainer.metrics.readings.spikes import SpikeReading
from pentad.trainer.numerics.spike_policy import SpikeError
from pentad.trainer.numerics.spike_verdict import RunNumbers, judge_spike
from pentad.trainer.processes.signals import StopRequest
from tests.distributed import run_distributed
from tests.training import job, open_trainer

TEXT = Path(__file__).parents[3] / "docs" / "architecture.md"
AT, STEPS = 24, 27
"""The step (from 0 on) with the spike, and all steps."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "alone": {},
    "dp": {"dp": 2},
    "zero": {"dp": 2, "sharding": "zero1"},
    "dp pp": {"dp": 2, "pp": 2, "pipeline": {"schedule": "zb-h1"}},
    "vocabulary": {"dp": 2, "pp": 2, "pipeline": {"vocab": "balanced"}},
    "tp cp": {"tp": 2, "cp": 2},
}
_FOUND = {"loss": (9.0, 2.0, 4.0)}


@dataclass(frozen=True)
class End:
    """What a rank has at the end.

    Args:
        state: of parameters and moments.
        updates: that were made.
        steps: that were done.
        spikes: the verdicts of the run, on every rank.
        error: with which it ended.
    """

    state: dict[str, Tensor]
    updates: float
    steps: int
    spikes: list[tuple[str, str, bool]]
    error: str


class _Spoiled:
    """Weights of the loss that are wrong: by a fault that passes, one of a rank, or in the data (samples)."""

    def __init__(self, kind: str, dp_rank: int, dp: int) -> None:
        self._kind, self._rank, self._dp, self._left = kind, dp_rank, dp, 1
        self._make = InputMaker.make

    def make(self, maker: InputMaker, batch: Microbatch, step: int, scale: float) -> Inputs:
        """As of `InputMaker`."""
        last = self._rank == self._dp - 1
        if self._kind == "transient" and step == AT and last and self._left:
            self._left, scale = 0, 1000 * scale
        if self._kind == "persistent" and step >= AT and last:
            scale *= 1000
        if self._kind in ("data", "nan") and 8 * AT + 5 in batch.samples.tolist():
            scale *= 1000 if self._kind == "data" else float("nan")
        return self._make(maker, batch, step, scale)


def _train(rank: int, world: int, wanted: dict[str, Any], kind: str, do: str, steps: int, folder: str) -> End:
    cfg = job(**wanted, steps=steps, numerics={"on_spike": do}, model={"vocab": 260})
    saves = replace(cfg.checkpoint, every=10, final=False)
    cfg = replace(cfg, checkpoint=saves, data=TextData(paths=(str(TEXT),), cache=f"{folder} data"))
    session, trainer = open_trainer(rank, cfg, Path(folder))
    spoiled = _Spoiled(kind, trainer.dp.rank, trainer.dp.size)
    spikes: list[tuple[str, str, bool]] = []
    ran, error = trainer._spikes.run, ""

    def run(*args: Any, **kwargs: Any) -> Any:
        result = ran(*args, **kwargs)
        if result.spike is not None:
            spikes.append((result.spike.cause, result.spike.did, result.spike.same_bits))
        return result

    try:
        with (
            patch.object(InputMaker, "make", lambda self, *args: spoiled.make(self, *args)),
            patch.object(trainer._spikes, "run", run),
        ):
            trainer.train(None, StopRequest())
    except SpikeError as raised:
        error = str(raised)
        if "persistent" in kind and trainer.dp.rank == trainer.dp.size - 1:
            all_reduce(torch.zeros(1, dtype=torch.float64), session.mesh.axis("world")).wait()  # others wait for us
    state = {name: piece.local.clone() for name, piece in trainer.tensors().items()}
    end = End(state, float(trainer.stepper.updates), trainer.step, spikes, error)
    trainer.checkpointer.close()
    session.close()
    return end


def _ends(layout: str, kind: str, do: str, folder: Path, steps: int = STEPS) -> list[End]:
    wanted = LAYOUTS[layout]
    return run_distributed(
        _train, job(**wanted).parallel.ranks, wanted, kind, do, steps, str(folder / f"{kind} {do} {steps}"), group=False
    )


def _same(some: list[End], others: list[End]) -> bool:
    return all(
        a.state.keys() == b.state.keys() and all(torch.equal(x, b.state[name]) for name, x in a.state.items())
        for a, b in zip(some, others, strict=True)
    )


def _slow_but(*quick: str) -> list[Any]:
    return [pytest.param(each, marks=[] if each in quick else pytest.mark.slow) for each in LAYOUTS]


@pytest.mark.parametrize("layout", _slow_but("dp", "dp pp"))
def test_a_spike_that_does_not_come_again_leaves_the_bits_of_an_undisturbed_run(layout: str, tmp_path: Path) -> None:
    clean, found = _ends(layout, "none", "tell", tmp_path), _ends(layout, "transient", "stop", tmp_path)
    assert all(end.spikes == [("transient", "trained with that run", False)] for end in found)
    assert _same(clean, found) and all(end.updates == STEPS for end in found)


@pytest.mark.parametrize("layout", _slow_but("dp", "dp pp"))
def test_a_spike_of_the_data_is_left_out_as_a_step_without_a_number_is(layout: str, tmp_path: Path) -> None:
    # Of a skipped step nothing is left but the loss that is not a number, which nobody trains with.
    reference, found = _ends(layout, "nan", "tell", tmp_path), _ends(layout, "data", "skip", tmp_path)
    cause = "data" if LAYOUTS[layout].get("dp", 1) > 1 else "repeats"
    assert all(end.spikes == [(cause, "left out", True)] for end in found)
    assert _same(reference, found) and all((end.updates, end.steps) == (STEPS - 1, STEPS) for end in found)


@pytest.mark.parametrize("layout", _slow_but("zero"))
def test_a_spike_of_the_data_takes_the_state_of_the_newest_checkpoint_and_no_data_twice(
    layout: str, tmp_path: Path
) -> None:
    before = _ends(layout, "none", "tell", tmp_path, steps=20)
    found = _ends(layout, "data", "rewind", tmp_path, steps=AT + 1)
    assert all("step-00000020" in end.spikes[0][1] for end in found)
    assert _same(before, found) and all((end.updates, end.steps) == (20, AT + 1) for end in found)


@pytest.mark.parametrize("layout", _slow_but("dp"))
def test_a_spike_is_trained_with_all_the_same_or_ends_the_run(layout: str, tmp_path: Path) -> None:
    plain, kept = _ends(layout, "data", "tell", tmp_path), _ends(layout, "data", "keep", tmp_path)
    assert _same(plain, kept) and all(end.spikes[0][1] == "trained with all the same" for end in kept)
    ends = _ends(layout, "data", "stop", tmp_path)
    for end in ends:
        assert end.steps == AT and f"step {AT + 1}: spike: loss" in end.error and "on_spike=stop" in end.error


@pytest.mark.parametrize("layout", [pytest.param("dp"), pytest.param("dp pp", marks=pytest.mark.slow)])
def test_a_rank_whose_microbatches_are_others_elsewhere_is_named(layout: str, tmp_path: Path) -> None:
    for end in _ends(layout, "persistent", "skip", tmp_path):
        assert end.steps == AT and "of data parallel rank 1" in end.error and "a fault of a rank" in end.error


def test_what_runs_elsewhere_say_about_the_cause() -> None:
    def run(held: bool, *shares: float, norm: float = 1.0) -> RunNumbers:
        return RunNumbers(sum(shares), norm, held, shares)

    high, low = run(True, 1.0, 9.0, 1.0, 9.0), run(False, 1.0, 1.0, 1.0, 1.0)
    assert judge_spike(_FOUND, high, low, None, 2).cause == "transient"
    assert judge_spike(_FOUND, high, high, None, 1).cause == "repeats"
    # Rank r makes the microbatches of rank r + 1: the same losses a place further, or those of rank 1 whatever it has.
    data = judge_spike(_FOUND, high, high, run(True, 9.0, 1.001, 9.0, 1.0), 2)
    rank = judge_spike(_FOUND, high, high, run(True, 1.0, 9.0, 1.0, 9.0), 2)
    norm = judge_spike(_FOUND, high, high, run(True, 9.0, 1.0, 9.0, 1.0, norm=2.0), 2)
    assert (data.cause, data.dp_rank) == ("data", None) and data.same_bits
    assert (rank.cause, rank.dp_rank) == ("persistent", 1)
    assert (norm.cause, norm.dp_rank) == ("persistent", None)


def test_the_event_says_what_it_was_and_what_became_of_it() -> None:
    cfg = job(dp=2, numerics={"on_spike": "skip"})
    verdict = judge_spike(_FOUND, RunNumbers(9, 1, True), RunNumbers(9, 1, True), None, 2)
    done = StepDone(
        step=30, loss=9.0, grad_norm=1.0, lr=1e-3, skipped=True, skips=1, tokens=128, tokens_seen=3840, valid=128,
        pairs=0, seconds=1.0, spike=replace(verdict, did="left out"),
    )  # fmt: skip
    reading = SpikeReading(RunFacts(cfg=cfg, devices=2, device="cpu", peak_tflops=None))
    alert = reading.step(done)["spike_alert"]
    assert alert.fields["cause"] == "repeats" and alert.fields["did"] == "left out" and "left out" in alert.text
