"""A job in another layout: what is derived is derived anew, and everything else stays."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pentad.configs import Config, UserError, load
from pentad.configs.reading.layout import relaid
from pentad.configs.validation.general import validate

_TINY = [
    *("model.layers=8", "model.hidden=32", "model.heads=4", "model.kv_heads=4", "model.ffn=48", "model.vocab=320"),
    *("train.seq_len=16", "train.steps=2", "train.global_batch=24", "train.micro_batch=1", "train.device=cpu"),
]


def _job(*more: str) -> Config:
    return load(None, [*_TINY, *more])


@pytest.mark.parametrize(
    ("given", "layout", "same_as"),
    [
        (["parallel.dp=4"], "dp=3", ["parallel.dp=3"]),
        (["parallel.pp=4", "parallel.pipeline.chunks=2"], "pp=2 dp=1", ["parallel.pp=2", "parallel.pipeline.chunks=2"]),
        (
            ["parallel.pp=4", "parallel.pipeline.schedule=interleaved"],
            "pp=2 pipeline.schedule=1f1b pipeline.chunks=1",
            ["parallel.pp=2", "parallel.pipeline.schedule=1f1b"],
        ),
        (["parallel.cp=4"], "cp=2 tp=2", ["parallel.cp=2", "parallel.tp=2"]),
        (["parallel.pp=4"], "pp=3 pipeline.layers=[3,3,2]", ["parallel.pp=3", "parallel.pipeline.layers=[3,3,2]"]),
    ],
    ids=["dp", "group of the schedule", "schedule", "method of context parallelism", "layers"],
)
def test_a_layout_is_the_job_that_its_overrides_would_make(given: list[str], layout: str, same_as: list[str]) -> None:
    laid, wanted = relaid(_job(*given), layout), _job(*same_as)
    assert laid.parallel == wanted.parallel and laid.model == wanted.model and not validate(laid)


def test_what_the_user_gave_stays() -> None:
    job = _job("parallel.pp=4", "parallel.pipeline.schedule=interleaved", "parallel.pipeline.group=8")
    assert relaid(job, "pp=2").parallel.pipeline.group == 8
    assert relaid(job, "") is job


def test_a_layout_may_be_none() -> None:
    with pytest.raises(UserError, match=r"parallel\.tq: unknown key; a layout has tp, pp"):
        relaid(_job(), "tq=2")
    with pytest.raises(UserError, match=r"parallel\.pp: expected an integer, got 'two'"):
        relaid(_job(), "pp=two")


def test_a_fallback_needs_no_size_of_its_own() -> None:
    job = _job("parallel.dp=4", "faults.recover=true", "faults.layouts=[tp=2, pp=3 dp=1]")
    assert job.faults.layouts == ("tp=2", "pp=3 dp=1")
    assert not validate(replace(job, faults=replace(job.faults, ladder=("layouts",))))
