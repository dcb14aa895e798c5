"""Parameters, gradients and states over any number of ranks: the same training at every point, the named ones to the
bit, bytes."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from pentad.configs.reading.spread import dense_spread, expert_spread
from pentad.configs.schema import AdamWConfig, ConstantSchedule, MoeConfig, RouterConfig
from pentad.parallel.gradients import Slot
from pentad.parallel.record import reader
from pentad.trainer.memory.fixed import held
from pentad.trainer.memory.traffic import replica_traffic
from pentad.trainer.pipeline.programs import Pipeline
from pentad.trainer.setup import unmet_mesh_of
from tests.covering import Case, pairwise
from tests.distributed import run_distributed
from tests.rows import without_copies
from tests.same_training import assembled, check, train
from tests.training import Run, job

EXPERTS = MoeConfig(experts=8, top_k=2, ffn=24, router=RouterConfig(groups_kept=1, aux_loss=0.1))
# tp, pp, cp, dp, ep
LAYOUTS = [
    (1, 1, 1, 4, 2),
    (1, 1, 2, 2, 1),
    (1, 2, 1, 4, 2),
    (2, 1, 1, 4, 4),
    (2, 1, 1, 2, 1),
    (2, 2, 1, 2, 2),
    (1, 1, 2, 4, 2),
    (1, 1, 1, 8, 2),
]
FACTORS: dict[str, list[Any]] = {
    "layout": LAYOUTS,
    "states": [1, 2, 4, "all"],
    "params": [1, 2, 4],
    "grads": [1, 2, 4, "all"],
    "experts": [False, True],
    "pipeline": ["1f1b", "zb-h1", "gis", "v-half-balanced"],
    "tied": [False, True],
    "bucket_mib": [0.001, 0.02],
    "documents": [False, True],
    "recompute": ["none", "full"],
}


def _allowed(case: Case) -> bool:
    _, pp, cp, dp, _ = case["layout"]
    grads, states = (dp * cp if case[key] == "all" else case[key] for key in ("grads", "states"))
    nested = dp * cp % states == 0 and states % grads == 0 and grads % case["params"] == 0
    return nested and (pp > 1 or case["pipeline"] == "1f1b")


CASES = pairwise(FACTORS, _allowed, seed=3)


def settings(case: Case) -> dict[str, Any]:
    """A case as arguments of `check`."""
    tp, pp, cp, dp, ep = case["layout"]
    schedule = case["pipeline"].removesuffix("-balanced")
    vocab = "ends" if schedule == case["pipeline"] else "balanced"
    experts = {"moe": EXPERTS} if case["experts"] else {}
    return {
        "tp": tp, "pp": pp, "cp": cp, "dp": dp, "ep": ep if case["experts"] else 1,
        "pipeline": {"schedule": schedule, "chunks": 1 if schedule in ("1f1b", "zb-h1") else 2, "vocab": vocab},
        "model": {"layers": 4, "tied": case["tied"], **experts},
        "params": case["params"],
        "grads": case["grads"],
        "states": case["states"],
        "bucket_mib": case["bucket_mib"],
        "steps": 3, "micro_batch": 1, "global_batch": 8,
        "masked": case["documents"],
        "recompute": case["recompute"],
    }  # fmt: skip


@pytest.mark.sample(2)
@pytest.mark.distributed
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id="-".join(map(str, c.values())), marks=[] if i % 9 == 0 else pytest.mark.slow)
        for i, c in enumerate(CASES)
    ],
)
def test_every_point_trains_like_one_process(case: Case) -> None:
    check(**settings(case))


def _bits(**wanted: Any) -> dict[str, torch.Tensor]:
    cfg = job(dp=4, steps=2, **wanted)
    return assembled(run_distributed(train, 4, cfg, False, group=False))


@pytest.mark.distributed
def test_names_are_points_to_the_bit() -> None:
    experts = {"layers": 1, "moe": EXPERTS}
    points = {"ddp": (1, 1, 1), "zero1": (1, 1, 4), "zero2": (1, 4, "all"), "fsdp": (4, "all", 4), "hsdp": (2, 2, 2)}
    for name, degrees in points.items():
        named = _bits(sharding=name, per_node=2, ep=2, model=experts)
        other = "zero2" if name == "ddp" else "ddp"
        each = dict(zip(("params", "grads", "states"), degrees, strict=True))
        point = _bits(sharding=other, **each, ep=2, model=experts)
        assert all(torch.equal(named[each], point[each]) for each in named)


@pytest.mark.distributed
@pytest.mark.parametrize("states", [2, 4])
def test_spread_parameters_are_those_of_whole_ones_to_the_bit(states: int) -> None:
    wanted = {"states": states, "grads": 2, "model": {"layers": 3}, "memory": {"group": 1}, "dtype": "bf16"}
    whole, spread = (_bits(**wanted, params=params) for params in (1, 2))
    assert all(torch.equal(whole[each], spread[each]) for each in whole)


@pytest.mark.distributed
def test_a_single_microbatch_is_summed_alike_however_gradients_are_spread() -> None:
    whole, spread = (_bits(sharding=name, global_batch=4, micro_batch=1) for name in ("zero1", "zero2"))
    assert all(torch.equal(whole[each], spread[each]) for each in whole)


def test_experts_have_as_many_copies_of_their_states_as_the_rest() -> None:
    def degrees(**wanted: Any) -> tuple[int, int]:
        cfg = job(model={"moe": EXPERTS}, **wanted)
        return dense_spread(cfg).states, expert_spread(cfg).states

    assert degrees(dp=8, ep=2, states="all") == (8, 4)
    assert degrees(dp=8, ep=2, states=4) == (4, 2)
    assert degrees(dp=8, ep=4, states=2) == (2, 1)  # two copies at most, and there are four of the rest
    assert degrees(dp=4, tp=2, states=2) == (2, 4)  # edp is 8
    assert degrees(dp=4, tp=2, states=1) == (1, 1)
    assert degrees(dp=8, ep=8, states="all") == (8, 1)


# Bytes -----------------------------------------------------------------------------------------------------------

_ADAM = AdamWConfig(lr=1e-3, schedule=ConstantSchedule())
_SENT = {"reduce_scatter": 1, "all_gather": 1, "all_reduce": 2}


def _measured(rank: int, world: int, cfg: Any, folder: str) -> tuple[tuple[int, ...], dict[str, float], int]:
    """Bytes of parameters, gradients, masters and states that a rank has; what it sends in a step for the gradients of
    microbatches, among neighbours and between copies; the most of gradients that is whole at a time."""
    path = Path(folder) / f"{rank}.ring"
    run = Run(rank, cfg, record=path)
    try:
        run.step(0)
        with _Opened() as opened:
            run.step(1)
        run.parts.replicas.wait_gathers()
        kept = run.parts.replicas.keep()
        masters = sum(each.nbytes for key, each in kept.items() if key.endswith(".master"))
        parameters = sum(each.nbytes for key, each in kept.items() if not key.endswith(".master"))
        gradients = sum(memory.nbytes() for memory in _gradient_memory(run))
        states = sum(each.nbytes for unit in run.optimizer.states.values() for each in unit.values())
        return (parameters, gradients, masters, states), _sent(run, path), opened.most
    finally:
        run.close()


def _sent(run: Run, path: Path) -> dict[str, float]:
    ring, spreads = reader.read(path), {"data": dense_spread(run.cfg), "edp": expert_spread(run.cfg)}
    sent = {"grads": 0.0, "states": 0.0, "copies": 0.0}
    for entry in without_copies(ring):
        kind, axis = ring.name(entry["kind"]), ring.name(entry["axis"])
        if int(entry["step"]) != 1 or not axis.startswith(("data", "edp")) or kind not in _SENT:
            continue
        size, grads = run.mesh.axis(axis).size, spreads[axis.partition("_")[0]].grads
        scatters = kind == "reduce_scatter" and grads > 1 and not axis.endswith("_between")
        part = "copies" if kind == "all_reduce" else "grads" if scatters else "states"
        sent[part] += _SENT[kind] * (size - 1) / size * int(entry["nbytes"])
    return sent


class _Opened:
    """Counts the bytes of full-size sums that are there at a time, by the storages that slots are given."""

    def __init__(self) -> None:
        self.most, self._alive = 0, dict[int, tuple[weakref.ref, int]]()
        self._give = Slot.give

    def __enter__(self) -> _Opened:
        def give(slot: Slot, buffer: torch.Tensor | None) -> None:
            self._give(slot, buffer)
            if buffer is not None and buffer._base is not None:
                base = buffer._base
                self._alive[id(base)] = weakref.ref(base), base.nbytes
            alive = sum(nbytes for ref, nbytes in self._alive.values() if ref() is not None)
            self.most = max(self.most, alive)

        Slot.give = give  # pyright: ignore[reportAttributeAccessIssue]
        return self

    def __exit__(self, *_: object) -> None:
        Slot.give = self._give


def _gradient_memory(run: Run) -> list[torch.UntypedStorage]:
    replicas = run.parts.replicas
    grads = [unit.grad for bucket in range(replicas.buckets) for unit in replicas.units(bucket)]
    return list({storage.data_ptr(): storage for storage in (grad.untyped_storage() for grad in grads)}.values())


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("grads", "states"), [(1, 1), (1, 2), (1, "all"), (2, 2), (2, "all"), ("all", "all")])
def test_bytes_are_those_of_the_closed_forms(tmp_path: Path, grads: Any, states: Any, dtype: str) -> None:
    wanted = {"model": {"layers": 4, "moe": EXPERTS}, "global_batch": 12, "micro_batch": 1, "bucket_mib": 0.01}
    cfg = job(dp=4, ep=2, grads=grads, states=states, dtype=dtype, optim=_ADAM, **wanted)
    found = run_distributed(_measured, 4, cfg, str(tmp_path), group=False)
    mine = held(cfg, Pipeline.of(cfg), 0)
    width = 2 if dtype == "bf16" else 4
    traffic = replica_traffic(mine.buckets, 4, width, microbatches=3)
    for memory, sent, opened in found:
        assert memory == (mine.parameters, mine.gradients, mine.masters, mine.states)
        assert sent == pytest.approx(
            {"grads": traffic.grads, "states": traffic.neighbours, "copies": traffic.copies}, abs=0.5
        )
        assert opened <= mine.opened < sum(bucket.elements for bucket in mine.buckets) * 4
        assert bool(opened) == (grads != 1)
    # Of N parameters, of which fragmentation is what fills up the buckets.
    for bucket in mine.buckets:
        over, part = (1 if n == 1 else bucket.replicas if n == "all" else bucket.replicas // 2 for n in (states, grads))
        assert bucket.share * over == bucket.kept * part == bucket.elements
    assert mine.parameters == width * sum(bucket.elements for bucket in mine.buckets)
    assert mine.local <= sum(bucket.elements for bucket in mine.buckets) < mine.local + 64 * len(mine.buckets)


def test_groups_of_neighbours_and_of_copies() -> None:
    cfg = job(tp=2, pp=2, dp=4, ep=2, states=2, model={"moe": EXPERTS})
    mesh = unmet_mesh_of(cfg, 11)  # pp 1, dp 1, tp 1
    assert mesh.axis("data").ranks == (9, 11, 13, 15)
    assert mesh.axis("data_states").ranks == (9, 11) and mesh.axis("data_states").rank == 1
    assert mesh.axis("data_copies").ranks == (11, 15)
    assert mesh.axis("edp").ranks == (9, 11, 13, 15)
    assert (mesh.axis("edp_states").ranks, mesh.axis("edp_copies").ranks) == ((9, 11), (11, 15))
    mesh = unmet_mesh_of(job(dp=8, grads=2, states=4), 6)
    assert (mesh.axis("data_grads").ranks, mesh.axis("data_between").ranks) == ((6, 7), (4, 6))
    assert (mesh.axis("data_states").ranks, mesh.axis("data_copies").ranks) == ((4, 5, 6, 7), (2, 6))
