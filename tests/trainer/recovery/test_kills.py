"""Ranks are killed at any point of a step, spares take their places, and the job ends with the bits of one that was not
disturbed."""

from __future__ import annotations

import random
import signal
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from pentad.configs.schema import MoeConfig, RouterConfig
from tests.trainer.recovery.harness import Kill, Ran, StandIn, small_job
from tests.training import world_of

ROUTED: dict[str, Any] = {
    "moe": MoeConfig(experts=4, top_k=2, ffn=24, router=RouterConfig(selection_bias=True, aux_loss=0.01))
}
BALANCED = {"schedule": "gis", "vocab": "balanced"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp 2, dp 2, zero1, bf16": {"tp": 2, "dp": 2, "sharding": "zero1", "dtype": "bf16"},
    "pp 2, dp 2, balanced vocabulary": {"pp": 2, "dp": 2, "pipeline": BALANCED},
    "dp 4, gradients and states over 2": {"dp": 4, "grads": 2, "states": 2},
    "pp 2, dp 2, fsdp": {"pp": 2, "dp": 2, "sharding": "fsdp", "dtype": "bf16"},
    "dp 2, ep 2, experts": {"dp": 2, "ep": 2, "model": ROUTED, "sharding": "zero1"},
    "pp 2, cp 2": {"pp": 2, "cp": 2, "dtype": "fp32"},
    "tp 2, pp 2, dp 2, experts": {"tp": 2, "pp": 2, "dp": 2, "ep": 2, "model": ROUTED, "sharding": "zero1"},
    "one rank": {"global_batch": 4},
}
STEPS = 8
WANTED: dict[str, Any] = {"steps": STEPS, "eval": {"every": 3, "steps": 1}, "checkpoint": {"every": 2, "keep": 0}}


def disturbed(folder: Path, layout: str, *kills: Kill, **wanted: Any) -> Ran:
    """Runs a job with a spare for every kill."""
    cfg = small_job(folder, **{**WANTED, **LAYOUTS[layout], **wanted})
    return StandIn(cfg, folder / "logs", len(kills), kills).run()


@cache
def undisturbed(folder: Path, layout: str) -> Ran:
    return disturbed(folder / "whole", layout)


def assert_same_training(ran: Ran, whole: Ran) -> None:
    """Every step once with the same numbers, and the same bits at the end."""
    assert not ran.errors, "\n".join(ran.errors.values())
    assert ran.curve == whole.curve
    assert ran.state.keys() == whole.state.keys()
    for name, value in whole.state.items():
        assert torch.equal(ran.state[name], value), name
    for key in ("step", "updates", "tokens", "skipped", "evaluation"):
        assert ran.about[key] == whole.about[key]
    assert ran.saved[-1] == whole.saved[-1]


def assert_recovered(ran: Ran, *kills: Kill) -> None:
    """Kills came to pass, and cost no step that had committed. A step may have fewer entries than a kill counts."""
    died = {number: code for number, code in ran.codes.items() if code}
    assert set(died) <= {kill.number for kill in kills} and 2 * len(died) >= len(kills)
    assert set(died.values()) == {-signal.SIGKILL} and len(ran.recoveries) == len(died)
    assert all(each["redone"] <= 1 and each["from"] == "snapshots" for each in ran.recoveries)


def random_kills(layout: str, seed: int, count: int) -> list[Kill]:
    """One a step, of any member of the mesh that there is by then."""
    draws = random.Random(f"{layout} {seed}")
    members = list(range(world_of(small_job(Path(), **LAYOUTS[layout]))))
    world, kills = len(members), list[Kill]()
    for step in sorted(draws.sample(range(STEPS - 1), count)):
        slot = draws.randrange(world)
        kills.append(Kill(members[slot], step, draws.randrange(24), after=draws.random() < 0.3))
        members[slot] = world + len(kills) - 1
    return kills


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "seed", "count"),
    [
        pytest.param("tp 2, dp 2, zero1, bf16", 0, 2),
        *(pytest.param(name, seed, 4, marks=pytest.mark.slow) for name in LAYOUTS for seed in (1, 2)),
    ],
)
def test_kills_at_random_points(layout: str, seed: int, count: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("kills")
    kills = random_kills(layout, seed, count)
    ran = disturbed(folder, layout, *kills)
    assert_recovered(ran, *kills)
    assert_same_training(ran, undisturbed(tmp_path_factory.getbasetemp() / layout, layout))


# Nothing is left --------------------------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "times"),
    [
        pytest.param("tp 2, dp 2, zero1, bf16", 50, marks=pytest.mark.slow),
        pytest.param("pp 2, dp 2, balanced vocabulary", 20, marks=pytest.mark.slow),
    ],
)
def test_meshes_are_made_anew_without_growth(layout: str, times: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, wanted = tmp_path_factory.mktemp("anew"), {**WANTED, "steps": times + 4, **LAYOUTS[layout]}
    cfg = small_job(folder, **wanted)
    members = tuple(range(world_of(cfg)))
    ran = StandIn(cfg, folder / "logs", anew=(members,) * times).run()
    assert not ran.errors and set(ran.codes.values()) == {0}
    assert [m["step"] for m in ran.metrics] == list(range(1, times + 5))
    for held in ran.held.values():
        assert len(held) == times + 1
        # What the mesh before had may be on its last steps, not longer.
        least = map(min, zip(*held[-5:], strict=True))
        assert all(now <= first for now, first in zip(least, held[1], strict=True))


# Other sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("sharding", ["ddp", "zero1"])
def test_data_parallelism_shrinks_and_grows(sharding: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """dp 4, 3, 2, 3, 4 at the same global batch of 12 microbatches: every sample once, the numbers of one size."""
    wanted = {**WANTED, "steps": 14, "dp": 4, "sharding": sharding, "global_batch": 24}
    folder = tmp_path_factory.mktemp(sharding)
    whole = StandIn(small_job(folder / "whole", **wanted), folder / "whole" / "logs").run()
    anew = ((0, 1, 3), (0, 1), (0, 1, 4), (0, 1, 4, 5))
    ran = StandIn(small_job(folder / "sized", **wanted), folder / "sized" / "logs", spares=2, anew=anew).run()
    assert not ran.errors, "\n".join(ran.errors.values())
    assert [each["from"] for each in ran.recoveries] == ["snapshots"] * 4
    assert all(each["redone"] <= 1 for each in ran.recoveries)
    assert [m["step"] for m in ran.metrics] == [m["step"] for m in whole.metrics]
    for mine, theirs in zip(ran.metrics, whole.metrics, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-9) and mine["tokens"] == theirs["tokens"]
    for name, value in whole.state.items():
        torch.testing.assert_close(ran.state[name], value, rtol=1e-7, atol=1e-9, msg=name)


def survivors(members: tuple[int, ...], lost: set[int], spares: list[int]) -> tuple[int, ...]:
    """Those that are left, in their order."""
    return tuple(number for number in members if number not in lost)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("sharding", "dtype", "seed"),
    [
        ("zero1", "fp32", 0),
        *(
            pytest.param(sharding, dtype, seed, marks=pytest.mark.slow)
            for sharding, dtype in (("zero1", "bf16"), ("ddp", "fp32"), ("zero1", "fp64"))
            for seed in (1, 2)
        ),
    ],
)
def test_elastic_sums_have_the_bits_of_an_undisturbed_run(
    sharding: str, dtype: str, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """dp 4, 3, 2, 4: two ranks are killed at random points of random steps; the mesh grows back between two others."""
    wanted = {**WANTED, "steps": 12, "dp": 4, "sharding": sharding, "dtype": dtype, "global_batch": 24}
    wanted["deterministic"] = "elastic"
    draws = random.Random(seed)
    steps, victims = sorted(draws.sample(range(1, 7), 2)), draws.sample(range(4), 2)
    kills = [Kill(number, step, draws.randrange(16)) for number, step in zip(victims, steps, strict=True)]
    left = tuple(number for number in range(4) if number not in victims)
    folder = tmp_path_factory.mktemp(sharding)
    whole = StandIn(small_job(folder / "whole", **wanted), folder / "whole" / "logs").run()
    cfg = small_job(folder / "sized", **wanted)
    ran = StandIn(cfg, folder / "logs", 2, tuple(kills), survivors, anew=((*left, 4, 5),), gently=True).run()
    assert [(len(each["lost"]), each["layout"], each["from"]) for each in ran.recoveries] == [
        (1, "dp=3", "snapshots"),
        (1, "dp=2", "snapshots"),
        (0, "", "snapshots"),
    ]
    assert ran.recoveries[-1]["redone"] == 0 and all(each["redone"] <= 1 for each in ran.recoveries)
    assert_same_training(ran, whole)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("model", [{}, ROUTED], ids=["dense", "experts"])
def test_a_job_falls_to_other_layouts(model: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    """tp 2, dp 2 with one rank less goes on as dp 3, with two less as a pipeline, and comes back: the same training."""
    wanted = {**WANTED, "steps": 12, "tp": 2, "dp": 2, "sharding": "zero1", "global_batch": 24, "model": model}
    folder = tmp_path_factory.mktemp("layouts")
    whole = StandIn(small_job(folder / "whole", **wanted), folder / "whole" / "logs").run()
    cfg, kills = small_job(folder / "laid", **wanted), (Kill(3, 2, 10), Kill(0, 5, 10))
    layouts = {3: "tp=1 dp=3", 2: "tp=1 dp=1 pp=2 pipeline.schedule=1f1b"}
    there = (1, 2, 4, 5)
    ran = StandIn(cfg, folder / "logs", 2, kills, survivors, anew=(there,), gently=True, layouts=layouts).run()
    assert not ran.errors, "\n".join(ran.errors.values())
    assert [(each["layout"], each["from"]) for each in ran.recoveries] == [
        (layouts[3], "snapshots"),
        (layouts[2], "snapshots"),
        ("", "snapshots"),
    ]
    assert [m["step"] for m in ran.metrics] == [m["step"] for m in whole.metrics]
    for mine, theirs in zip(ran.metrics, whole.metrics, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-11) and mine["tokens"] == theirs["tokens"]
    for name, value in whole.state.items():
        torch.testing.assert_close(ran.state[name], value, rtol=1e-7, atol=1e-9, msg=name)


# Nodes ------------------------------------------------------------------------------------------------------------

TWO = {0: 0, 1: 0, 2: 1, 3: 1}
"""The first members' nodes."""


def lose_nodes(folder: Path, spares: list[int], *kills: Kill) -> Ran:
    """Runs a job whose nodes go with the first of their processes that is killed; `spares`: the nodes of these."""
    cfg = small_job(folder, **{**WANTED, **LAYOUTS[NODES]})
    nodes = TWO | {len(TWO) + at: node for at, node in enumerate(spares)}
    return StandIn(cfg, folder / "logs", len(spares), kills, nodes=nodes.__getitem__, whole_nodes=True).run()


NODES = "tp 2, dp 2, zero1, bf16"


@pytest.mark.distributed
def test_a_lost_nodes_state_comes_from_its_partners(tmp_path_factory: pytest.TempPathFactory) -> None:
    ran = lose_nodes(tmp_path_factory.mktemp("nodes"), [2, 2, 0, 0], Kill(3, 2, 10), Kill(5, 5, 8))
    assert [(each["lost"], each["from"], each["redone"]) for each in ran.recoveries] == [([2, 3], "snapshots", 0)] * 2
    assert_same_training(ran, undisturbed(tmp_path_factory.getbasetemp() / NODES, NODES))


@pytest.mark.slow
@pytest.mark.distributed
def test_the_first_slots_node_is_lost(tmp_path_factory: pytest.TempPathFactory) -> None:
    ran = lose_nodes(tmp_path_factory.mktemp("nodes"), [1, 1], Kill(0, 3, 10))
    assert [(each["lost"], each["from"]) for each in ran.recoveries] == [([0, 1], "snapshots")]
    assert_same_training(ran, undisturbed(tmp_path_factory.getbasetemp() / NODES, NODES))


@pytest.mark.slow
@pytest.mark.distributed
def test_a_slot_and_its_partner_lost_together_cost_the_steps_since_the_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TWO, 2, 0)  # three on one node, of which at most one has a partner elsewhere
    folder = tmp_path_factory.mktemp("nodes")
    ran = lose_nodes(folder, [1, 1, 1], Kill(0, 3, 10))
    (told,) = ran.recoveries
    assert told["lost"] == [0, 1, 2] and told["from"] != "snapshots" and told["step"] == 2
    assert "no copy of the newest state is left" in (folder / "logs" / "4.log").read_text()
    assert_same_training(ran, undisturbed(tmp_path_factory.getbasetemp() / NODES, NODES))
