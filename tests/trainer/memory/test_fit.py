"""Jobs that need more memory than their devices have: refused or warned of, with changes that are valid and help."""

from __future__ import annotations

import re

import pytest

from pentad.configs import load
from pentad.trainer.memory.estimate import GIB, estimate
from pentad.trainer.memory.fit import CERTAIN, memory_findings

H100 = ["hardware.preset=h100_sxm", "train.global_batch=64", "train.seq_len=4096"]
TOO_LARGE = [
    ["model.preset=llama3_8b", "parallel.data.sharding=ddp"],
    ["model.preset=llama3.1_70b", "parallel.pp=2", "parallel.tp=2", "parallel.dp=2"],
    ["model.preset=llama3.1_70b", "parallel.pp=4", "parallel.pipeline.schedule=gis", "parallel.pipeline.chunks=2"],
    ["model.preset=mixtral_8x7b", "parallel.ep=2", "parallel.dp=2"],
    ["model.preset=deepseek_v3", "parallel.pp=8", "parallel.ep=8", "parallel.dp=8"],
    ["model.preset=llama3_8b", "train.micro_batch=16", "parallel.dp=2", "parallel.data.sharding=fsdp"],
]


@pytest.mark.parametrize("overrides", TOO_LARGE, ids=lambda o: o[0].partition("=")[2])
def test_advice_is_accepted_and_is_enough(overrides: list[str]) -> None:
    overrides = [*H100, *overrides]
    cfg = load(None, overrides)
    assert estimate(cfg).total > (cfg.hardware.memory_gib or 0) * GIB
    (problem,), warnings = memory_findings(cfg)
    assert not warnings and problem.key == "hardware.memory_gib"
    found = re.search(r"; set (.*) \((\d+) ranks\): ", problem.message)
    assert found, problem.message
    changed = load(None, [*overrides, *found[1].split()])  # valid, or this raises
    assert estimate(changed).total <= (cfg.hardware.memory_gib or 0) * GIB
    p = changed.parallel
    assert p.ranks == int(found[2])
    assert memory_findings(changed) == ([], [])


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
