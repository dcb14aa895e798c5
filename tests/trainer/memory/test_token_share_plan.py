"""memory.token_share=auto: what is chosen fits when it is run, and nothing of the space that fits would be faster."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest

from pentad.configs import UserError
from pentad.configs.schema import Config, HardwareConfig
from pentad.models.costs.activations import layer_rows
from pentad.models.costs.flops import layer_flops
from pentad.models.costs.kept import Choice, SomeTokens, kept_bytes
from pentad.models.costs.times import LayerTimes, Rates
from pentad.trainer.memory.estimate import GIB, per_rank
from pentad.trainer.memory.plan import MARGIN, Group, decided, groups_of, planned, shares_of
from pentad.trainer.memory.stages import bench_of, ways_of
from pentad.trainer.pipeline.programs import Pipeline, offloads
from tests.distributed import run_distributed
from tests.measured_memory import check_that_the_plan_fits, most_bytes
from tests.same_training import worst
from tests.trainer.memory.layouts import draw_job
from tests.training import curve, job

SEEDS = range(20)
SAMPLE = (2,)
MARKED = [pytest.param(s, marks=[] if s in SAMPLE else pytest.mark.slow) for s in SEEDS]
RECOMPUTE = ("selective", "none")
PARTS = ("norm", "activation", "attention", "ffn")


def draw(seed: int) -> Config:
    """A random small job with a made-up limit of its devices between what it needs with and without these parts."""
    draws = random.Random(f"share {seed}")
    while True:
        cfg = draw_job(draws.randrange(10**6))
        # Copies of a few layers' activations hide, those of others do not.
        hardware = HardwareConfig(peak_tflops=0.05, host_gib_s=draws.choice([0.05, 0.2, 1.0]))
        train = replace(cfg.train, device="cpu")
        memory = replace(cfg.memory, recompute="selective", recompute_parts=PARTS, recompute_layers=None)
        cfg = replace(cfg, train=train, hardware=hardware, memory=memory)
        least, most = most_bytes(cfg), most_bytes(replace(cfg, memory=replace(memory, recompute="none")))
        if most > 1.15 * least:
            break
    gib = (least + draws.uniform(0.1, 0.9) * (most - least)) / MARGIN / GIB
    memory = replace(memory, recompute=draws.choice(["selective", "auto"]), token_share="auto")
    return replace(cfg, memory=memory, hardware=replace(hardware, memory_gib=gib))


@pytest.mark.distributed
@pytest.mark.parametrize("seed", MARKED)
def test_what_is_chosen_fits_when_it_is_run(seed: int) -> None:
    check_that_the_plan_fits(draw(seed))


@pytest.mark.parametrize("seed", MARKED)
def test_nothing_that_fits_is_faster(seed: int) -> None:
    """Every share that is looked at, with every assignment of a rank's layers under it."""
    cfg = draw(seed)
    chosen, limit = decided(cfg), MARGIN * GIB * (cfg.hardware.memory_gib or 0.0)
    pipeline = Pipeline.of(chosen)
    plan = dict(pipeline.remade)
    work = bench_of(cfg, ways_of(cfg)).work
    times = LayerTimes(
        model=cfg.model, work=work, length=cfg.train.seq_len, rates=Rates.of(cfg.hardware, cfg.train.dtype)
    )
    for rank in range(cfg.parallel.pp):
        mine = [layer for group in groups_of(cfg, pipeline, rank) for layer in group.layers]
        taken = sum(times.again(layer, plan.get(layer, "none")) for layer in mine)
        for share in shares_of(cfg):
            for choices in _all(groups_of(cfg, pipeline, rank, share)):
                assert all(_hides(cfg, layer, choice) for layer, choice in choices.items())
                spent = sum(times.again(layer, choice) for layer, choice in choices.items())
                if spent < taken * (1 - 1e-9):
                    assert _total(planned(cfg, plan | choices), rank) > limit, (rank, share, choices)


def _all(groups: list[Group]) -> Iterator[dict[int, Choice]]:
    for each in product(*(group.assignments for group in groups)):
        pairs = zip(groups, each, strict=True)
        yield {layer: choice for g, a in pairs for layer, choice in zip(g.layers, a.choices, strict=True)}


def _total(cfg: Config, rank: int) -> float:
    return per_rank(cfg, ranks=(rank,))[0].total


def _hides(cfg: Config, layer: int, choice: Choice) -> bool:
    """Whether what a layer keeps is copied during its forward pass, where the rows of some tokens are among it."""
    if not isinstance(choice, SomeTokens) or not offloads(cfg):
        return True
    p, t, rates = cfg.parallel, cfg.train, Rates.of(cfg.hardware, cfg.train.dtype)
    seconds = layer_flops(cfg.model, t.seq_len)[layer] * t.micro_batch / p.tp / p.cp / rates.flops
    rows = layer_rows(cfg.model, layer, bench_of(cfg, ways_of(cfg)).work)
    return kept_bytes(rows, choice) <= seconds * rates.host_bytes * (1 + 1e-9)


def _offloading(memory_gib: float | None, host_gib_s: float, **memory: object) -> Config:
    cfg = job(
        model={"layers": 4},
        seq_len=64,
        steps=3,
        group=1,
        offload="all",
        recompute="selective",
        memory={"recompute_parts": PARTS, "token_share": "auto", **memory},
    )
    return replace(cfg, hardware=HardwareConfig(peak_tflops=1e-3, host_gib_s=host_gib_s, memory_gib=memory_gib))


def test_the_share_is_that_with_which_copies_just_hide() -> None:
    """MEMO's: (S_kept + share · S_tokens) / B ≤ T_layer."""
    slow = _offloading(None, 1e-4)
    rows = layer_rows(slow.model, 0, bench_of(slow, ways_of(slow)).work)
    whole, all_again = kept_bytes(rows), kept_bytes(rows, PARTS)
    seconds = layer_flops(slow.model, 64)[0] * 2 / 1e9
    for wanted in (0.0, 0.3, 0.6, 1.0):
        rate = (all_again + (wanted + 0.01) * (whole - all_again)) / seconds / 2**30
        pipeline = Pipeline.of(decided(_offloading(None, rate)))
        choice = pipeline.choice(0)
        share = choice.blocks.kept / choice.blocks.size if isinstance(choice, SomeTokens) else float(choice == "none")
        assert wanted - 1 / 64 <= share <= wanted + 0.01
    nothing = Pipeline.of(decided(_offloading(None, 0.5 * all_again / seconds / 2**30)))
    assert nothing.choice(0) == frozenset(PARTS)


def test_the_host_bounds_the_share() -> None:
    fast = _offloading(None, 1e3)
    assert not decided(fast).memory.plan  # all hides, and is kept
    (least,), (most,) = (per_rank(_offloading(None, 1e3, token_share="none", recompute=each)) for each in RECOMPUTE)
    shares = []
    for room in (0.05, 0.4, 0.8):
        gib = (least.host + room * (most.host - least.host)) / GIB
        chosen = decided(_offloading(None, 1e3, host_gib=gib))
        (memory,) = per_rank(chosen)
        assert memory.host <= gib * GIB
        shares.append(min(share for _, _, share in chosen.memory.plan or ()))
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == pytest.approx(0.75, abs=1 / 64)
    with pytest.raises(UserError, match=r"memory\.host_gib"):
        per_rank(decided(_offloading(None, 1e3, host_gib=1e-5)))


@pytest.mark.distributed
def test_training_is_that_of_the_same_job_without() -> None:
    cfg = job(pp=2, model={"layers": 4}, seq_len=64, steps=3, memory={"recompute_parts": PARTS})
    most, least = (
        most_bytes(replace(cfg, memory=replace(cfg.memory, recompute=each))) for each in ("none", "selective")
    )
    limit = HardwareConfig(memory_gib=(least + 0.5 * (most - least)) / MARGIN / GIB)
    memory = replace(cfg.memory, recompute="selective", token_share="auto")
    auto = replace(cfg, hardware=limit, memory=memory, train=replace(cfg.train, device="cpu"))
    assert any(0 < share < 1 for _, _, share in decided(auto).memory.plan or ())
    found, expected = (run_distributed(curve, 2, each, group=False) for each in (auto, cfg))
    assert all(worst([mine], theirs) < 1e-12 for mine, theirs in zip(found, expected, strict=True))
