"""Spikes of loss and gradient norm."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pentad.trainer.metrics.metric import Alert
from pentad.trainer.metrics.readings.protocol import RunFacts, StepDone
from pentad.trainer.metrics.readings.spikes import SpikeFinder, SpikeReading
from pentad.trainer.numerics.loss_table import loss_shares
from tests.distributed import run_distributed
from tests.training import Run, job


def _done(step: int, loss: float, norm: float = 1.0, **given: Any) -> StepDone:
    return StepDone(
        step=step, loss=loss, grad_norm=norm, lr=1e-3, skips=0, tokens=128, tokens_seen=128 * step, valid=128,
        pairs=0, seconds=1.0, **{"skipped": False, **given},
    )  # fmt: skip


def _reading(**numerics: Any) -> SpikeReading:
    cfg = job(dp=2)
    faults = replace(cfg.faults, numerics=replace(cfg.faults.numerics, **numerics))
    places = lambda samples: [("walk", 16 * sample) for sample in samples]  # noqa: E731
    return SpikeReading(
        RunFacts(cfg=replace(cfg, faults=faults), devices=2, device="cpu", peak_tflops=None, locate=places)
    )


def _alerts(reading: SpikeReading, steps: list[StepDone]) -> list[Alert]:
    return [alert for done in steps if (alert := reading.step(done).get("spike_alert")) is not None]


@pytest.mark.parametrize("seed", range(20))
def test_a_noisy_loss_that_falls_smoothly_raises_no_alarm(seed: int) -> None:
    draws = np.random.default_rng(seed)
    steps = np.arange(1, 1001)
    losses = 2 + 8 * np.exp(-steps / 100) + 0.2 * draws.standard_normal(1000)
    norms = (0.5 + 20 * np.exp(-steps / 30)) * np.exp(0.3 * draws.standard_normal(1000))
    done = [_done(int(step), loss, norm) for step, loss, norm in zip(steps, losses, norms, strict=True)]
    assert _alerts(_reading(), done) == []


@pytest.mark.parametrize("what", ["loss", "grad_norm"])
def test_a_poisoned_batch_and_a_gradient_of_50_times_its_norm_are_found_with_their_samples(what: str) -> None:
    steps = [_done(step, 2.0 + 0.01 * (step % 7), 1 + 0.1 * (step % 5)) for step in range(1, 60)]
    shares = (0.6, 0.4, 5.4, 0.5)
    spike = {"loss": _done(60, sum(shares), losses=shares), "grad_norm": _done(60, 2.0, 50.0)}[what]
    (alert,) = _alerts(_reading(), [*steps, spike, *(replace(done, step=done.step + 60) for done in steps)])
    fields = alert.fields
    assert alert.event == "spike" and fields["step"] == 60 and fields["samples"] == [472, 479]
    assert set(fields) & {"loss", "grad_norm"} == {what}
    assert fields[what]["value"] > fields[what]["limit"] > fields[what]["expected"]
    if what == "loss":
        worst = fields["microbatches"][0]
        assert worst["microbatch"] == 2 and worst["dp_rank"] == 0 and worst["samples"] == [476, 477]
        assert worst["loss"] == pytest.approx(4 * 5.4)
        assert worst["places"] == [["walk", 16 * 476], ["walk", 16 * 477]]
        assert "476-477" in alert.text


def test_nothing_is_said_in_the_warm_up_of_skipped_steps_or_with_the_key_off() -> None:
    steps = [_done(step, 2.0) for step in range(1, 60)]
    assert _alerts(_reading(), [*steps[:19], _done(20, 9.0)]) == []
    assert _alerts(_reading(), [*steps, _done(60, math.nan, skipped=True)]) == []
    assert _alerts(_reading(spikes=False), [*steps, _done(60, 9.0)]) == []


def test_a_level_that_stays_is_reported_five_times_and_then_expected() -> None:
    finder = SpikeFinder(log=False)
    assert not any(finder.step(1.0) for _ in range(30))
    found = [finder.step(10.0) is not None for _ in range(40)]
    assert found == [True] * 5 + [False] * 35


def _poisoned(rank: int, world: int, bad: int) -> list[StepDone]:
    """A training of two ranks, of which one gets random tokens in step `bad`."""
    cfg = job(dp=2, steps=bad + 20, global_batch=8, dtype="fp32", optim="adamw")
    run = Run(rank, cfg)
    done = []
    try:
        for step in range(cfg.train.steps):
            batches, valid = run.batches(step)
            if step == bad - 1 and rank == 1:
                shape = batches[0].tokens.shape
                rows = torch.from_numpy(np.random.default_rng(3).integers(0, 64, (len(batches), *shape)))
                batches = [replace(b, tokens=x, labels=x.roll(-1, 1)) for b, x in zip(batches, rows, strict=True)]
            result = run.stepper.run(step, batches, valid, 1e-2, watched=lambda: (0.0,))
            shares = loss_shares(result.worst.wait().tolist()[2:], 1)  # behind what is watched and the own loss
            assert sum(shares) == pytest.approx(float(result.loss), rel=1e-5)
            done.append(_done(step + 1, float(result.loss), float(result.grad_norm), losses=shares))
        return done
    finally:
        run.close()


@pytest.mark.distributed
def test_random_tokens_in_a_training_are_found_and_their_microbatches_named() -> None:
    steps = run_distributed(_poisoned, 2, 120, group=False)[0]
    (alert,) = _alerts(_reading(), steps)
    assert alert.fields["step"] == 120
    first, second, _ = alert.fields["microbatches"]
    assert {first["microbatch"], second["microbatch"]} == {1, 3} and {first["dp_rank"], second["dp_rank"]} == {1}


def _shares(rank: int, world: int, wanted: dict[str, Any]) -> tuple[float, ...]:
    """What each microbatch of a step adds to its loss."""
    run = Run(rank, job(**wanted))
    try:
        batches, valid = run.batches(0)
        result = run.stepper.run(0, batches, valid, 1e-2, watched=lambda: (0.0,))
        return loss_shares(result.worst.wait().tolist()[2:], run.mesh.axis("cp").size)
    finally:
        run.close()


@pytest.mark.distributed
def test_what_a_microbatch_adds_to_the_loss_is_the_same_in_every_layout() -> None:
    (alone,) = run_distributed(_shares, 1, {}, group=False)
    assert len(alone) == 4 == len(set(alone))
    layouts: tuple[dict[str, Any], ...] = (
        {"tp": 2, "pp": 2},
        {"cp": 2, "dp": 2},
        {"pp": 2, "pipeline": {"vocab": "balanced"}},
    )
    for wanted in layouts:
        for shares in run_distributed(_shares, job(**wanted).parallel.ranks, wanted, group=False):
            assert shares == pytest.approx(alone, rel=1e-11), wanted
