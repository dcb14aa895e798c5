"""The number of chunks is found by trial, alike on all ranks, and changes nothing else."""

from __future__ import annotations

import torch

from pentad.configs.schema import MoeConfig, RouterConfig
from pentad.models.moe import Moe
from pentad.parallel.expert.dispatch import AllToAll
from pentad.trainer.overlap import OverlapTuner
from tests.distributed import run_distributed
from tests.training import Run, job


def _job(chunks):
    moe = MoeConfig(experts=4, top_k=2, ffn=16, router=RouterConfig(groups_kept=1), overlap_chunks=chunks)
    return job(dp=2, ep=2, model={"moe": moe}, steps=14, global_batch=4)


def _trained(rank: int, world: int, chunks):
    run = Run(rank, _job(chunks))
    tuner = OverlapTuner(run.cfg, run.parts, run.mesh)
    curve, tried = [], []
    try:
        for step in range(run.cfg.train.steps):
            with tuner.step():
                curve.append(run.step(step)[:2])
                dispatchers = [m.dispatch for m in run.parts.model.modules() if isinstance(m, Moe)]
                tried += [d.chunks for d in dispatchers if isinstance(d, AllToAll)][:1]
        return curve, tried, tuner.search.chosen if tuner.search else None
    finally:
        run.close()


def test_all_ranks_choose_alike_and_train_as_without():
    ranks = run_distributed(_trained, 2, "auto", group=False)
    plain = run_distributed(_trained, 2, 1, group=False)
    for curve, tried, chosen in ranks:
        assert tried[:12] == [1] * 4 + [2] * 4 + [4] * 4
        assert chosen == ranks[0][2] and tried[12:] == [chosen] * 2
        torch.testing.assert_close(torch.tensor(curve), torch.tensor(plain[0][0]), rtol=1e-11, atol=0)
    assert plain[0][2] is None
