"""The pipeline's layers over another number of ranks: of all even splits and all seatings the one that moves least."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations_with_replacement, permutations
from typing import Any

import pytest
import torch

from pentad.configs.schema import Config, MoeConfig
from pentad.models.transformer import Transformer
from pentad.trainer.pipeline.programs import Pipeline
from pentad.trainer.recovery.resplit import Splits, StageHoldings, assigned, best_seating, reseated
from tests.training import job


def test_an_assignment_is_the_best_of_all() -> None:
    draws = random.Random(5)
    for _ in range(300):
        rows = draws.randint(1, 5)
        columns = rows + draws.randint(0, 2)
        worth = [[draws.choice((0, 0, 1, 5, draws.randint(0, 99))) for _ in range(columns)] for _ in range(rows)]
        found = assigned(worth)
        assert len(set(found)) == rows
        best = max(sum(worth[row][at] for row, at in enumerate(each)) for each in permutations(range(columns), rows))
        assert sum(worth[row][at] for row, at in enumerate(found)) == best


def with_pipeline(cfg: Config, pp: int, layers: Any = "auto") -> Config:
    p = cfg.parallel
    return replace(cfg, parallel=replace(p, pp=pp, pipeline=replace(p.pipeline, layers=layers)))


def held(cfg: Config) -> list[set[tuple[str, int]]]:
    """For each pipeline rank the rows of all its parameters, from the model itself."""
    pipeline, found = Pipeline.of(cfg), []
    for rank in range(cfg.parallel.pp):
        with torch.device("meta"):
            model = Transformer(cfg.model, pipeline.split.part(pipeline.stages_of(rank)))
        mine = set[tuple[str, int]]()
        for name, param in model.named_parameters():
            numel = param.numel()
            first, last = 0, numel
            if pipeline.split.balanced and name in ("embed.weight", "head.weight"):
                first, last = (numel * each // cfg.parallel.pp for each in (rank, rank + 1))
            mine |= {(name, at) for at in range(first, last)}
        found.append(mine)
    return found


def even_splits(cfg: Config, pp: int) -> list[Config]:
    """All splits over so many ranks whose stages take as long, the longest first, as those of the job's own one."""

    def worth(each: Config) -> list[float]:
        times = Pipeline.of(each).times.forward
        return [round(time, 9) for time in sorted(times, reverse=True)]

    wanted = worth(with_pipeline(cfg, pp))
    cuts = combinations_with_replacement(range(cfg.model.layers + 1), pp - 1)
    counts = [tuple(b - a for a, b in zip((0, *cut), (*cut, cfg.model.layers), strict=True)) for cut in cuts]
    return [each for each in (with_pipeline(cfg, pp, split) for split in counts) if worth(each) == wanted]


def least_moved(cfg: Config, pp: int, left: list[int]) -> int:
    """By trying everything; the first rank stays the first."""
    before, found = held(cfg), []
    for each in even_splits(cfg, pp):
        after = held(each)
        for seats in permutations([*left, *[-1] * pp], pp):
            if 0 not in left or seats[0] == 0:
                pairs = zip(seats, after, strict=True)
                found.append(sum(len(new - before[old] if old >= 0 else new) for old, new in pairs))
    return min(found)


SMALL: dict[str, Any] = {"hidden": 4, "heads": 1, "kv_heads": 1, "head_dim": 4, "ffn": 4, "vocab": 24}
MOE = {"moe": MoeConfig(experts=2, top_k=1, ffn=4, every=2)}
JOBS: dict[str, dict[str, Any]] = {
    "dense": {"model": {**SMALL, "layers": 8}},
    "dense, 7 layers": {"model": {**SMALL, "layers": 7}},
    "tied": {"model": {**SMALL, "layers": 5, "tied": True}},
    "every second layer of experts": {"model": {**SMALL, **MOE, "layers": 6}},
    "balanced": {"model": {**SMALL, "layers": 8}, "pipeline": {"vocab": "balanced"}},
}


@pytest.mark.parametrize("name", JOBS)
def test_nothing_moves_less(name: str) -> None:
    cfg = job(pp=4, **JOBS[name])
    before = StageHoldings.of(cfg)
    assert [before.size(rank) for rank in range(4)] == list(map(len, held(cfg)))
    for lost in range(4):
        left = [rank for rank in range(4) if rank != lost]
        small = with_pipeline(cfg, 3)
        splits = Splits.of(small)
        after = [StageHoldings.of(small).split(splits, number) for number in range(len(splits.counts))]
        assert after == [StageHoldings.of(with_pipeline(cfg, 3, counts)) for counts in splits.counts]
        found = [best_seating(before, each, left, stays=True).moved for each in after]
        assert min(found) == least_moved(cfg, 3, left)


def test_back_to_all_ranks_only_the_newcomer_and_what_it_frees_move() -> None:
    cfg = job(pp=4, **JOBS["dense"])
    for split in ((2, 3, 3), (3, 2, 3), (3, 3, 2)):
        small = with_pipeline(cfg, 3, split)
        found = best_seating(StageHoldings.of(small), StageHoldings.of(cfg), [0, 1, 2], stays=True)
        before, after = held(small), held(cfg)
        every = permutations([0, 1, 2, -1], 4)
        tried = [
            sum(len(new - before[old] if old >= 0 else new) for old, new in zip(seats, after, strict=True))
            for seats in every
            if seats[0] == 0
        ]
        assert found.moved == min(tried) and found.seats.count(None) == 1 and found.seats[0] == 0


def test_each_pipeline_goes_on_with_its_own_processes() -> None:
    """pp 4 with 2 replicas of 2 tensor ranks: slots count stage by stage."""
    cfg = job(pp=4, dp=2, tp=2, model={"layers": 8})
    before, after = StageHoldings.of(cfg), StageHoldings.of(with_pipeline(cfg, 3, (3, 3, 2)))
    members = [100 + slot for slot in range(16)]
    found = reseated(before, after, members, {9}, [])
    assert found.seats[0] == 100 and len(found.seats) == 12 and len(set(found.seats)) == 12
    assert (
        all(((number or 0) - 100) % 4 == slot % 4 for slot, number in enumerate(found.seats)) and 109 not in found.seats
    )
    # A pipeline that has lost two gets one that another one can spare.
    found = reseated(before, after, members, {9, 5}, [])
    assert sum(((number or 0) - 100) % 4 != slot % 4 for slot, number in enumerate(found.seats)) == 1
    with pytest.raises(ValueError, match="12 slots, and 11 processes"):
        reseated(before, after, members, set(range(5)), [])
