"""Jobs that need more memory than their devices have: refused or warned of, with changes that are valid and help."""

from __future__ import annotations

import re

import pytest

from pentad.configs import load
from pentad.trainer.memory.estimate import GIB, estimate
from pentad.trainer.memory.fit import CERTAIN, memory_findings
from pentad.trainer.memory.step_time import step_time

H100 = ["hardware.preset=h100_sxm", "train.global_batch=64", "train.seq_len=4096"]
TOO_LARGE = [
    ["model.preset=llama3_8b", "parallel.data.sharding=ddp"],
    ["model.preset=llama3.1_70b", "parallel.pp=2", "parallel.tp=2", "parallel.dp=2"],
    ["model.preset=llama3.1_70b", "parallel.pp=4", "parallel.pipeline.schedule=gis", "parallel.pipeline.chunks=2"],
    ["model.preset=mixtral_8x7b", "parallel.ep=2", "parallel.dp=2"],
    ["model.preset=deepseek_v3", "parallel.pp=8", "parallel.ep=8", "parallel.dp=8"],
    ["model.preset=llama3_8b", "train.micro_batch=16", "parallel.dp=2", "parallel.data.sharding=fsdp2"],
]
_QUICK = ("llama3_8b", "mixtral_8x7b")
CASES = [
    pytest.param(job, id=f"{name}-{i}", marks=[] if name in _QUICK else pytest.mark.slow)
    for i, job in enumerate(TOO_LARGE)
    for name in [job[0].partition("=")[2]]
]
REMEDY = re.compile(r"(?:; set|; or) ([^()]+) \((\d+) ranks\): [\d.]+ GiB, device time ([+-]\d+)%")


@pytest.mark.parametrize("overrides", CASES)
def test_advice_is_accepted_is_enough_and_the_cheapest_comes_first(overrides: list[str]) -> None:
    overrides = [*H100, *overrides]
    cfg = load(None, overrides)
    available = (cfg.hardware.memory_gib or 0) * GIB
    assert estimate(cfg).total > available
    (problem,), warnings = memory_findings(cfg)
    assert not warnings and problem.key == "hardware.memory_gib"
    found = REMEDY.findall(problem.message)
    assert len(found) >= 2, problem.message
    costs = [int(cost) for *_, cost in found]
    assert costs == sorted(costs)
    now = step_time(cfg).device_seconds_per_token
    for (changes, ranks, cost), _ in zip(found, range(2), strict=False):
        changed = load(None, [*overrides, *changes.split()])  # valid, or this raises
        assert estimate(changed).total <= available
        assert changed.parallel.ranks == int(ranks)
        assert 100 * (step_time(changed).device_seconds_per_token / now - 1) == pytest.approx(int(cost), abs=0.51)
        assert memory_findings(changed) == ([], [])


def test_time_grows_with_what_a_change_costs() -> None:
    base = load(None, [*H100, "model.preset=llama3_8b", "parallel.pp=2", "parallel.dp=2"])
    now = step_time(base).device_seconds_per_token

    def costs(*changes: str) -> float:
        changed = load(None, [*H100, "model.preset=llama3_8b", "parallel.pp=2", "parallel.dp=2", *changes])
        return step_time(changed).device_seconds_per_token / now

    # Of three passes' products one more is done; the rest of the step stays.
    assert 1.2 < costs("memory.recompute=full") < 4 / 3 + 0.02
    assert 1 < costs("parallel.dp=4") < costs("parallel.pp=8") < costs("parallel.tp=8") < 3
    assert costs("memory.offload_optimizer=host") > 1


def test_nothing_to_say_where_it_fits_or_no_memory_is_given() -> None:
    assert memory_findings(load("demo", ["hardware.memory_gib=1"])) == ([], [])
    assert memory_findings(load("demo")) == ([], [])


def test_within_the_uncertainty_of_the_estimate_is_a_warning() -> None:
    memory = estimate(load("demo"))
    uncertain = (1 - CERTAIN) * (memory.activations + memory.working)
    for share, refused in ((0.5, False), (1.5, True)):
        available = (memory.total - share * uncertain) / GIB
        problems, warnings = memory_findings(load("demo", [f"hardware.memory_gib={available!r}"]))
        assert (len(problems), len(warnings)) == (int(refused), int(not refused))


def test_a_model_that_nothing_makes_small_enough() -> None:
    (problem,), _ = memory_findings(load("demo", ["hardware.memory_gib=1e-6"]))
    assert "not even" in problem.message and "is enough" in problem.message
