"""memory.recompute=auto: what is chosen fits when it is run, and nothing that fits would be faster."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations_with_replacement, product

import pytest

from pentad.configs.schema import Config
from pentad.models.costs.activations import layer_rows
from pentad.models.costs.kept import Choice, kept_bytes
from pentad.models.costs.times import LayerTimes, Rates
from pentad.models.costs.widths import LocalWork
from pentad.trainer.memory.estimate import GIB, per_rank
from pentad.trainer.memory.fit import memory_findings
from pentad.trainer.memory.plan import MARGIN, decided, groups_of, planned
from pentad.trainer.pipeline.programs import Pipeline
from tests.distributed import run_distributed
from tests.measured_memory import check_that_the_plan_fits, most_bytes
from tests.trainer.memory.layouts import draw_job
from tests.training import curve, job

SEEDS = range(20)
SAMPLE = (2,)
MARKED = [pytest.param(s, marks=[] if s in SAMPLE else pytest.mark.slow) for s in SEEDS]


def _auto(cfg: Config, share: float) -> Config:
    """The job on devices that have room for this share of what can be made again at all."""
    train = replace(cfg.train, device="cpu")  # otherwise devices that are described are GPUs
    most, least = (
        most_bytes(replace(cfg, train=train, memory=replace(cfg.memory, recompute=each))) for each in ("none", "full")
    )
    gib = (least + share * (most - least)) / MARGIN / GIB
    memory = replace(cfg.memory, recompute="auto", recompute_parts=())
    return replace(cfg, train=train, memory=memory, hardware=replace(cfg.hardware, memory_gib=gib))


def draw(seed: int) -> Config:
    """A random small job with a made-up limit of its devices."""
    draws = random.Random(seed)
    while True:
        cfg = draw_job(draws.randrange(10**6))
        none, full = (most_bytes(replace(cfg, memory=replace(cfg.memory, recompute=each))) for each in ("none", "full"))
        if none > 1.15 * full:
            return _auto(cfg, draws.uniform(0.1, 0.9))


@pytest.mark.distributed
@pytest.mark.parametrize("seed", MARKED)
def test_what_is_chosen_fits_when_it_is_run(seed: int) -> None:
    check_that_the_plan_fits(draw(seed))


@pytest.mark.parametrize("seed", MARKED)
def test_nothing_that_fits_is_faster(seed: int) -> None:
    """Every multiset of choices of a rank's layers of a kind, of many layers those of two choices, by brute force."""
    cfg = draw(seed)
    chosen, limit = decided(cfg), MARGIN * GIB * (cfg.hardware.memory_gib or 0.0)
    plan = {layer: "full" if parts == "full" else frozenset(parts) for layer, parts, _ in chosen.memory.plan or ()}
    pipeline = Pipeline.of(chosen)
    for rank in range(cfg.parallel.pp):
        groups = groups_of(cfg, pipeline, rank)
        seconds = {(group.layers, each.choices): each.seconds for group in groups for each in group.assignments}
        taken = sum(seconds[group.layers, tuple(plan.get(layer, "none") for layer in group.layers)] for group in groups)
        handfuls = [
            sorted({choice for each in group.assignments for choice in each.choices}, key=str) for group in groups
        ]
        spaces = [
            list(combinations_with_replacement(handful, len(group.layers)))
            for group, handful in zip(groups, handfuls, strict=True)
        ]
        for assignment in product(*spaces):
            ordered = [_ordered(cfg, group.layers, each) for group, each in zip(groups, assignment, strict=True)]
            keys = [(group.layers, each) for group, each in zip(groups, ordered, strict=True)]
            if any(key not in seconds for key in keys):
                continue  # more than two choices among many layers
            spent = sum(seconds[key] for key in keys)
            if spent < taken * (1 - 1e-9):
                pairs = zip(groups, ordered, strict=True)
                choices = {layer: choice for g, each in pairs for layer, choice in zip(g.layers, each, strict=True)}
                (found,) = per_rank(planned(cfg, plan | choices), ranks=(rank,))
                assert found.total > limit, (rank, choices)


def _ordered(cfg: Config, layers: tuple[int, ...], choices: tuple[Choice, ...]) -> tuple[Choice, ...]:
    """Those that keep least first."""
    work = LocalWork(sequences=1, tokens=cfg.train.seq_len, width=4, tp=cfg.parallel.tp)
    rows = layer_rows(cfg.model, layers[0], work)
    return tuple(sorted(choices, key=lambda choice: kept_bytes(rows, choice)))


def test_more_room_never_costs_more_time() -> None:
    cfg = draw(3)
    spent = []
    for share in (0.05, 0.3, 0.6, 1.01):
        chosen = decided(_auto(cfg, share))
        pipeline = Pipeline.of(chosen)
        times = [Pipeline.of(chosen).times.backward, Pipeline.of(planned(cfg, {})).times.backward]
        spent.append(sum(times[0]) - sum(times[1]))
        assert len(pipeline.remade) == len(chosen.memory.plan or ())
    assert spent == sorted(spent, reverse=True) and spent[-1] == 0.0 < spent[0]


def test_what_cannot_fit_is_one_error() -> None:
    cfg = replace(_auto(draw(1), -0.5))
    chosen = decided(cfg)
    layers = cfg.model.layers + cfg.model.mtp
    assert len(chosen.memory.plan or ()) == layers
    (problem,), _ = memory_findings(chosen)
    assert problem.key == "hardware.memory_gib"


def test_the_choices_of_a_layer_go_from_cheap_to_sparing() -> None:
    cfg = job(model={"hidden": 64, "heads": 4, "head_dim": 16, "ffn": 256}, dtype="bf16", seq_len=64)
    work = LocalWork(sequences=2, tokens=128, width=2)
    times = LayerTimes(model=cfg.model, work=work, length=64, rates=Rates(1e15, 1e11, ""))
    choices = times.handful(0, ["norm", "activation", "attention", "ffn", "moe"])
    rows = layer_rows(cfg.model, 0, work)
    kept, seconds = [kept_bytes(rows, c) for c in choices], [times.again(0, c) for c in choices]
    assert choices[0] == "none" and choices[-1] == "full" and len(choices) > 3
    assert kept == sorted(kept, reverse=True) and seconds == sorted(seconds)
    rates = [(t - s) / (a - b) for a, b, s, t in zip(kept, kept[1:], seconds, seconds[1:], strict=False)]
    assert rates == sorted(rates)


@pytest.mark.distributed
def test_training_is_that_of_the_same_job_without() -> None:
    cfg = job(pp=2, model={"layers": 4}, seq_len=64, steps=3)
    auto = _auto(cfg, 0.4)
    assert decided(auto).memory.plan
    without = replace(auto, memory=replace(auto.memory, recompute="none"))
    assert run_distributed(curve, 2, auto, group=False) == run_distributed(curve, 2, without, group=False)
