"""Ranks of empty stages, which hold no parameter, no layer or no expert, take part in everything like the others."""

from __future__ import annotations

from typing import Any

import pytest

from pentad.configs.schema import Config, MoeConfig, RouterConfig
from pentad.trainer.overlap import OverlapTuner
from tests.distributed import run_distributed
from tests.same_training import check
from tests.trainer.checkpoint.test_resume import straight, text_job, train
from tests.training import Run, job

EMPTY = {"layers": (2, 0, 2)}


def _model(dense: int = 0, **moe: Any) -> dict[str, Any]:
    router = RouterConfig(groups_kept=1, selection_bias=True, bias_rate=0.01, aux_loss=0.1, aux_level="global_batch")
    return {"layers": 4, "moe": MoeConfig(experts=4, ffn=16, router=router, dense_layers=dense, **moe)}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "settings",
    [
        {"sharding": "ddp", "pipeline": EMPTY},
        {"dp": 2, "ep": 2, "sharding": "zero1", "pipeline": EMPTY},
        {"pipeline": {"schedule": "zb-h1", "layers": (4, 0, 0)}, "optim": "sgd"},
        {"model": _model(dense=2), "pipeline": {"layers": (2, 0, 2)}},  # the first has dense layers only
        {"model": {"layers": 4}, "pipeline": EMPTY},
    ],
    ids=["experts", "experts-dp", "last-empty-sgd", "dense-layers-first", "dense"],
)
def test_training_is_that_of_one_process(settings):
    check(**{"pp": 3, "model": _model(), "steps": 3, **settings})


def _tuned(rank: int, world: int, cfg: Config) -> int | None:
    run = Run(rank, cfg)
    tuner = OverlapTuner(run.cfg, run.parts, run.mesh)
    try:
        for step in range(12):
            with tuner.step():
                run.step(step)
        return tuner.search.chosen if tuner.search else None
    finally:
        run.close()


@pytest.mark.distributed
def test_they_choose_the_number_of_chunks_with_the_others():
    chosen = run_distributed(_tuned, 3, job(pp=3, model=_model(overlap_chunks="auto"), pipeline=EMPTY), group=False)
    assert chosen[0] is not None and len(set(chosen)) == 1


@pytest.mark.distributed
def test_a_run_goes_on_under_another_split_that_leaves_ranks_empty(tmp_path):
    model = _model()
    reference = straight(tmp_path, 1, text_job(tmp_path, model=model))
    rows = []
    for layers, until in (((2, 0, 2), 10), ((0, 4, 0), 20)):
        cfg = text_job(tmp_path, model=model, pp=3, pipeline={"layers": layers}, sharding="zero1")
        rows += run_distributed(train, 3, cfg, tmp_path / "run", until, group=False)[0][0]
    assert [row[0] for row in rows] == list(range(1, 21))
    for mine, theirs in zip(rows, reference, strict=True):
        assert mine[1:] == pytest.approx(theirs[1:], rel=1e-11)
