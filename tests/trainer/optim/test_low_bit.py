"""Coded moments are the same in every layout, go from one into another, and survive what steps meet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pentad.configs.schema import AdamWConfig, Config, MoeConfig
from tests.distributed import run_distributed
from tests.trainer.checkpoint.test_resume import text_job, train
from tests.training import Run, job

MODEL: dict[str, Any] = {"hidden": 48, "ffn": 160, "heads": 4, "head_dim": 12, "vocab": 96}
"""Rows of 48 and 160 elements: no row is made of whole blocks, and cuts fall into blocks."""
EXPERTS = {**MODEL, "moe": MoeConfig(experts=4, top_k=2, ffn=160)}
LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp": {"dp": 2},
    "zero1": {"dp": 4, "sharding": "zero1"},
    "zero1, tp": {"dp": 2, "tp": 2, "sharding": "zero1"},
    "tp 4": {"tp": 4},
    "balanced": {"pp": 2, "tp": 2, "pipeline": {"schedule": "1f1b", "vocab": "balanced"}},
    "balanced, zero1": {"pp": 2, "dp": 2, "sharding": "zero1", "pipeline": {"schedule": "1f1b", "vocab": "balanced"}},
    "experts": {"dp": 2, "tp": 2, "ep": 2, "etp": 2, "sharding": "zero1", "model": EXPERTS},
    "experts apart": {"dp": 4, "ep": 2, "sharding": "zero1", "model": EXPERTS},
}
ALWAYS = ("zero1, tp", "balanced")


def coded(cfg: Config, states: str = "int4", above: int = 500) -> Config:
    """The job with coded moments of all its matrices."""
    assert isinstance(cfg.optim, AdamWConfig)
    return replace(cfg, optim=replace(cfg.optim, states=states, states_above=above))  # type: ignore[arg-type]


def trained(rank: int, world: int, cfg: Config) -> tuple[list[Any], list[tuple[str, Any, Any, torch.Tensor]]]:
    """The curve, and all that a checkpoint would have of this rank's states."""
    run = Run(rank, cfg)
    try:
        curve = [run.step(step)[:2] for step in range(cfg.train.steps)]
        stored = run.optimizer.stored(list(run.parts.replicas.pieces()))
        boxes = [
            (name, (tensor.shape, box.offsets), box.sizes, tensor.view_of(box.offsets, box.sizes).clone())
            for name, tensor in stored.items()
            for box in tensor.boxes
        ]
        return curve, boxes
    finally:
        run.close()


def assembled(ranks: list[Any]) -> dict[str, torch.Tensor]:
    """Whole tensors; where several ranks have something, it is the same."""
    whole: dict[str, torch.Tensor] = {}
    for _, boxes in ranks:
        for name, (shape, offsets), sizes, values in boxes:
            target = whole.setdefault(name, torch.full(shape, torch.nan, dtype=torch.float64))
            for dim, (start, size) in enumerate(zip(offsets, sizes, strict=True)):
                target = target.narrow(dim, start, size)
            seen = ~torch.isnan(target)
            torch.testing.assert_close(target[seen], values.double()[seen], rtol=1e-9, atol=0.0, msg=name)
            target.copy_(values)
    assert not any(torch.isnan(value).any() for value in whole.values())
    return whole


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "states"),
    [
        pytest.param(layout, states, marks=() if layout in ALWAYS and states == "int4" else pytest.mark.slow)
        for layout in LAYOUTS
        for states in ("int4", "int8")
    ],
)
def test_every_layout_has_the_codes_of_one_process(layout: str, states: str) -> None:
    wanted = {"steps": 4, "model": MODEL, **LAYOUTS[layout]}
    cfg = coded(job(**wanted), states)
    alone = coded(job(steps=4, model=wanted["model"]), states)
    (expected,) = run_distributed(trained, 1, alone, group=False)
    ranks = run_distributed(trained, cfg.parallel.ranks, cfg, group=False)
    for curve, _ in ranks:
        for mine, theirs in zip(curve, expected[0], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-10)
    mine, theirs = assembled(ranks), assembled([expected])
    assert mine.keys() == theirs.keys() and any(".rows/" in name or ".blocks/" in name for name in mine)
    for name, value in theirs.items():
        state, _, parameter = name.removeprefix("optim/").partition("/")
        if f"optim/{state}.blocks/{parameter}" in theirs or f"optim/{state}.rows/{parameter}" in theirs:
            assert torch.equal(mine[name], value), name  # codes
        else:
            torch.testing.assert_close(mine[name], value, rtol=1e-8, atol=1e-13, msg=name)


@pytest.mark.sample(1)
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("first", "second", "states"),
    [
        ("zero1, tp", "one", "int4"),
        ("one", "zero1, tp", "int8"),
        pytest.param("tp 4", "zero1", "int4", marks=pytest.mark.slow),
        pytest.param("zero1, tp", "zero1, tp", "bf16", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_under_another_layout(tmp_path: Path, first: str, second: str, states: str) -> None:
    layouts: dict[str, dict[str, Any]] = {"one": {}, **LAYOUTS}
    model = {**MODEL, "vocab": 320}
    (reference,) = run_distributed(
        train,
        1,
        coded(text_job(tmp_path, model=dict(model)), states),
        tmp_path / "straight",
        20,
        group=False,
    )
    rows = []
    for name, until in ((first, 10), (second, 20)):
        cfg = coded(text_job(tmp_path, model=dict(model), **layouts[name]), states)
        rows += run_distributed(train, cfg.parallel.ranks, cfg, tmp_path / "run", until, group=False)[0][0]
    assert len(rows) == 20
    for mine, theirs in zip(rows, reference[0], strict=True):
        assert mine[1:] == pytest.approx(theirs[1:], rel=1e-9)


@pytest.mark.parametrize("states", ["int4", "int8", "bf16"])
def test_a_skipped_step_leaves_everything(states: str) -> None:
    """Codes too: those of what codes stand for may be others."""
    good, bad = (Run(0, coded(job(model=MODEL, dtype="fp32"), states)) for _ in range(2))
    assert good.step(0) == bad.step(0)
    weight = bad.parts.model.get_parameter("layers.0.ffn.up.weight")
    before = {k: {n: v.clone() for n, v in s.items()} for k, s in bad.optimizer.states.items()}
    healthy = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] = float("inf")
    assert bad.step(1)[2] == 1.0
    with torch.no_grad():
        weight[0, 0] = healthy
    after = bad.optimizer.states
    assert all(torch.equal(after[key][name], value) for key, s in before.items() for name, value in s.items())
    assert bad.step(1) == good.step(1)
    for run in (good, bad):
        run.close()


@pytest.mark.parametrize(("above", "count"), [(48 * 160, 0), (48 * 160 - 1, 6)])
def test_small_parameters_keep_their_moments(above: int, count: int) -> None:
    run = Run(0, coded(job(model=MODEL), above=above))
    stored = run.optimizer.stored(list(run.parts.replicas.pieces()))
    run.close()
    assert len({name for name in stored if ".blocks/" in name and "ffn" in name}) == count
    assert stored["optim/exp_avg/layers.0.attention_norm.weight"].dtype == torch.float64
