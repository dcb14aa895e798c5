"""What a run with experts reports: the arithmetic of its metrics, the console's column, the trackers' heat map."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pentad.configs.load import load
from pentad.configs.schema import Config, LogConfig, MoeConfig, RouterConfig, TextData
from pentad.models.costs.flops import s_mfu_flops_per_step, step_flops
from pentad.models.routing.balance import FIELDS, columns
from pentad.trainer.job.outputs import Outputs
from pentad.trainer.metrics.line_file import finite
from pentad.trainer.metrics.metric import Picture
from pentad.trainer.metrics.peak import Peak
from pentad.trainer.metrics.readings import routing
from pentad.trainer.metrics.readings.routing import HeatMap, heat_map, is_pictured, sparse_flops, summarize_routing
from pentad.trainer.metrics.report import Report
from pentad.trainer.metrics.sinks import make_sinks
from pentad.trainer.metrics.sinks.wandb import WandbSink
from pentad.trainer.processes.signals import StopRequest
from tests.distributed import run_distributed
from tests.trainer.metrics.reports import facts, read, report
from tests.trainer.metrics.test_console import header, line
from tests.training import job, open_trainer

TOKENS = 100
JOB = [
    *("name=test", "data.name=stdlib", "model.layers=4", "model.hidden=32", "model.heads=2", "model.ffn=64"),
    *("model.vocab=320", "model.moe.experts=4", "model.moe.top_k=2", "model.moe.dense_layers=1", "train.steps=10"),
    *("train.global_batch=8", "train.micro_batch=1", "train.seq_len=64", "parallel.dp=2", "model.moe.every=2"),
]


def config(*overrides: str) -> Config:
    """Four layers, of which only the one with index 2 has experts; with model.moe.every=1 1, 2 and 3 have."""
    return load(None, [*JOB, *overrides], world_size=2)


def totals(cfg: Config, loads: list[list[float]], **fields: float) -> np.ndarray:
    """A step's totals: `loads` per layer and choice, the other fields the same in every layer."""
    found = np.zeros((len(loads), columns(cfg.model.moe)))
    for row, load_of_layer in zip(found, loads, strict=True):
        experts = sum(load_of_layer[: cfg.model.moe.experts])
        values = {"tokens": TOKENS, "assignments": experts, "null": sum(load_of_layer) - experts, **fields}
        for name, value in values.items():
            row[FIELDS.index(name)] = value
        row[len(FIELDS) :] = load_of_layer
    return found


def test_metrics_of_one_layer() -> None:
    cfg = config("parallel.ep=2", "model.moe.router.aux_loss=0.01")
    moe = summarize_routing(totals(cfg, [[20, 40, 60, 80]], dropped=30, entropy=120, top1=55, aux=1.25, z=3.5), cfg)
    spread = math.sqrt((30**2 + 10**2 + 10**2 + 30**2) / 4) / 50
    expected = {
        "load_max": 80 / 50,
        "load_min": 20 / 50,
        "load_std": spread,
        "dropped": 30 / 200,
        "null": 0.0,
        "entropy": 1.2,
        "top1": 0.55,
        "aux": 1.25,
        "z": 3.5,
        "ep_load_max": (60 + 80) / 100,
    }
    assert moe["layers"] == [2]
    assert {name: moe[name] for name in expected} == {name: [pytest.approx(v)] for name, v in expected.items()}
    assert moe["mean"] == {name: pytest.approx(value) for name, value in expected.items()}
    assert moe["worst"] == {name: [pytest.approx(value), 2] for name, value in expected.items()}


def test_what_a_job_does_not_have_is_left_out() -> None:
    cfg = config()
    moe = summarize_routing(totals(cfg, [[1, 2, 3, 4]]), cfg)
    assert not {"aux", "ep_load_max"} & {*moe, *moe["mean"], *moe["worst"]}


def test_null_experts_are_no_load() -> None:
    cfg = config("model.moe.router.null_experts=2")
    moe = summarize_routing(totals(cfg, [[20, 40, 20, 20, 60, 40]]), cfg)
    assert (moe["null"], moe["load_max"], moe["load_min"]) == ([0.5], [1.6], [0.8])


def test_worst_layers_are_named() -> None:
    cfg = config("model.moe.every=1")
    loads = [[50.0, 50, 50, 50], [100, 40, 30, 30], [51, 50, 50, 49]]
    found = totals(cfg, loads)
    found[:, FIELDS.index("entropy")] = [130.0, 120, 110]
    moe = summarize_routing(found, cfg)
    assert moe["layers"] == [1, 2, 3]
    assert moe["worst"]["load_max"] == [2.0, 2] and moe["worst"]["load_min"] == [0.6, 2]
    assert moe["worst"]["entropy"] == [1.1, 3]
    assert moe["mean"]["load_max"] == pytest.approx((1 + 2 + 1.02) / 3)


def test_layers_without_tokens_have_no_value() -> None:
    cfg = config("model.moe.every=1")
    moe = summarize_routing(totals(cfg, [[0, 0, 0, 0], [1, 1, 1, 5], [0, 0, 0, 0]]), cfg)
    assert moe["worst"]["load_max"] == [2.5, 2]
    row = json.loads(json.dumps(finite(moe), allow_nan=False))
    assert row["load_max"] == [None, 2.5, None] and row["mean"]["load_max"] is None
    nothing = json.loads(json.dumps(finite(summarize_routing(totals(cfg, [[0.0] * 4] * 3), cfg)), allow_nan=False))
    assert nothing["worst"]["load_max"] == [None, None]
    assert line(step_report(cfg, [[0.0] * 4] * 3), 10).split()[-3:] == ["-", "-", "-"]


def test_values_are_short() -> None:
    cfg = config()
    found = totals(cfg, [[1, 1, 1, 0]], entropy=100 / 3)
    text = json.dumps(summarize_routing(found, cfg)["entropy"])
    assert text == "[0.333333]"


@pytest.mark.parametrize(("dropped", "null"), [(0, 0), (50, 0), (0, 100)])
def test_s_mfu_counts_the_experts_that_ran(dropped: int, null: int) -> None:
    cfg = config("model.moe.every=1", *(["model.moe.router.null_experts=4"] if null else []))
    model, pairs = cfg.model, 64 * 64 / 2 * 8
    load_of_layer = [(200 - null) / 4] * 4 + ([null / 4] * 4 if null else [])
    found = sparse_flops(model, 512, pairs, totals(cfg, [load_of_layer] * 3, dropped=dropped))
    whole, experts = s_mfu_flops_per_step(model, 512, pairs), step_flops(model, 512, pairs).experts
    # Half of 8 choices are null experts: the closed form expects 1 expert per token, and 1 is what was counted.
    assert found == pytest.approx(whole - experts * dropped / 200)
    assert found < whole or not dropped


LOADS = ([50.0, 50, 50, 50], [20.0, 40, 60, 80])


def step_report(cfg: Config, loads: list[list[float]] | None = None) -> Report:
    """Of a step of 2 s on four devices of 100 TFLOP/s; the last layer's load is uneven."""
    found = totals(cfg, loads or [LOADS[0]] * (len(cfg.model.moe_layers) - 1) + [LOADS[1]], entropy=120)
    return read(facts(cfg), routed=found)


def test_s_mfu_is_over_the_peak() -> None:
    cfg = config()
    found = totals(cfg, [LOADS[1]], entropy=120)
    flops = sparse_flops(cfg.model, 800, 6000.0, found)
    row = json.loads(json.dumps(read(facts(cfg), routed=found).row, allow_nan=False))
    assert row["moe"]["s_mfu"] == pytest.approx(flops / (2.0 * 4 * 100e12)) and row["moe"]["load_max"] == [1.6]
    unknown = read(facts(cfg, peak_tflops=None), routed=found)
    assert unknown.row["moe"]["s_mfu"] is None and "moe/s_mfu" not in unknown.tracked


def test_console_has_one_column_more() -> None:
    with_experts, dense = step_report(config()), read(facts())
    assert header(10, with_experts).split() == [*header(10, dense).split()[:-2], "load", "slowest", "eta"]
    shown = line(with_experts, 10)
    assert len(shown) == len(header(10, with_experts)) and shown.split()[-3:] == ["1.60", "-", "-"]
    assert dense.row["moe"] is None


@pytest.mark.parametrize("load_max", [1.0, 9.999, 99.97, 128.0, 1234.5, 1e9, math.nan, math.inf])
def test_console_line_never_exceeds_120_columns(load_max: float) -> None:
    straggler = {"rank": 123456, "score": 0.01, "host": "a-very-long-node-name", "reason": "compute"}
    moe = {"worst": {"load_max": [load_max, 0]}}
    made = report(cfg=config(), step=99999999, straggler=straggler, moe=moe, eta_s=1e9, skipped=True)
    shown = line(made, 10**8)
    assert "load" in header(10**8, made), "all of pentad's own columns fit, however many steps there are"
    assert len(shown) == len(header(10**8, made)) + len(" SKIP") <= 120, shown


def test_tracker_keys() -> None:
    cfg = config("model.moe.every=1")
    values = step_report(cfg).tracked
    assert values["moe/max_vio/3"] == pytest.approx(0.6) and values["moe/max_vio/1"] == 0
    assert values["moe/entropy/2"] == 1.2 and values["moe/dropped/1"] == 0
    assert values["moe/worst/load_max"] == 1.6 and values["moe/mean/load_min"] == pytest.approx(2.4 / 3)
    assert values["moe/s_mfu"] > 0 and "moe/load" not in values
    assert all(isinstance(v, (int, float)) for k, v in values.items() if k.startswith("moe/"))


def test_when_the_heat_map_is_drawn() -> None:
    cfg = config("log.tensorboard=true", "train.steps=250")
    assert [step for step in range(1, 251) if is_pictured(cfg, step)] == [100, 200, 250]
    evaluating = config("log.wandb=true", "train.steps=250", "eval.every=70")
    assert [step for step in range(1, 251) if is_pictured(evaluating, step)] == [70, 140, 210, 250]
    silent = config("train.steps=250")
    assert not any(is_pictured(silent, step) for step in range(1, 251))


def test_heat_map() -> None:
    cfg = config("model.moe.every=1", "model.moe.router.null_experts=2")
    heat = heat_map(totals(cfg, [[20, 40, 60, 80, 7, 7], [0] * 6, [50, 50, 50, 50, 7, 7]]), cfg, 5)
    assert heat.layers == (1, 2, 3)
    assert heat.load.tolist() == [[0.4, 0.8, 1.2, 1.6], [1.0] * 4, [1.0] * 4]
    drawn = routing.image(HeatMap(5, tuple(range(60)), np.linspace(0, 2, 60 * 256).reshape(60, 256)))
    assert drawn.dtype == np.uint8 and drawn.shape[0] <= 1200 and drawn.shape[1] <= 1400 and drawn.shape[2] == 3


def test_heat_map_is_blue_below_the_mean_and_red_above_it() -> None:
    drawn = routing.image(HeatMap(5, (0, 1), np.array([[0.0] * 4, [2.0] * 4]))).astype(int)
    above, below = np.argwhere(drawn[..., 2] > drawn[..., 0] + 50), np.argwhere(drawn[..., 0] > drawn[..., 2] + 50)
    left = drawn.shape[1] // 2  # right of it stands the scale, which has all colours
    above, below = above[above[:, 1] < left], below[below[:, 1] < left]
    assert len(above) > 1000 and len(below) > 1000 and above[:, 0].max() < below[:, 0].min()


def test_wandb_gets_the_heat_map_in_its_only_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "absent"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    cfg = config("log.wandb=true", "train.steps=7")
    sink = WandbSink("pentad", tmp_path / "run", {})
    calls: list[dict[str, Any]] = []
    log = sink.run.log

    def counted(data: dict[str, Any], **kwargs: Any) -> None:
        calls.append(data)
        log(data, **kwargs)

    monkeypatch.setattr(sink.run, "log", counted)
    sink.log(step_report(cfg))
    sink.close()
    (values,) = calls
    assert isinstance(values["moe/load"], wandb.Image) and values["moe/max_vio/2"] == pytest.approx(0.6)
    assert list((tmp_path / "run").rglob("media/images/moe/load_*.png"))


def test_tensorboard_files_have_the_heat_map(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = config("log.tensorboard=true", "train.steps=7")
    sinks = make_sinks(LogConfig(tensorboard=True), tmp_path, {}, total_steps=10)
    sinks.log(step_report(cfg))
    sinks.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (picture,) = events.Images("moe/load")
    assert picture.step == 7 and picture.width > 100
    assert [event.value for event in events.Scalars("moe/max_vio/2")] == [pytest.approx(0.6)]
    assert "Picture" not in (tmp_path / "metrics.jsonl").read_text()


class _Kept:
    """Sinks and an event log that keep what they are given."""

    def __init__(self) -> None:
        self.reports: list[Report] = []

    def log(self, report: Any, **fields: Any) -> None:
        if isinstance(report, Report):
            self.reports.append(report)


def _train(rank: int, world: int, cfg: Config, folder: Path) -> list[tuple[dict[str, Any], Any]]:
    """Of each step what routers did, and the picture."""
    kept = _Kept()
    session, trainer = open_trainer(rank, cfg, folder, peak=Peak(1.0, "test"))
    try:
        trainer.train(Outputs(kept, kept), StopRequest())  # type: ignore[arg-type]
        trainer.checkpointer.close()
    finally:
        session.close()
    return [(report.row["moe"], report.tracked.get("moe/load")) for report in kept.reports]


@pytest.mark.distributed
def test_a_run_reports_the_same_in_every_layout(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"the {n}th line is {n * n} long\n" for n in range(500)))
    router = RouterConfig(groups_kept=1, null_experts=2, aux_loss=0.1, selection_bias=True)
    moe = MoeConfig(experts=4, top_k=2, ffn=24, capacity_factor=0.5, router=router)
    wanted: dict[str, Any] = {"model": {"vocab": 320, "moe": moe}, "steps": 3}

    def reported(name: str, world: int, **layout: Any) -> list[tuple[Any, Any]]:
        cfg = job(**wanted, **layout)
        data = TextData(paths=(str(text),), cache=str(tmp_path / "cache"))
        cfg = dataclasses.replace(cfg, data=data, log=LogConfig(tensorboard=True))
        return run_distributed(_train, world, cfg, tmp_path / name, group=False)[0]

    alone, together = reported("alone", 1), reported("together", 2, dp=2, ep=2)
    assert len(alone) == len(together) == 3
    for (one, _), (two, _) in zip(alone, together, strict=True):
        assert one["layers"] == two["layers"] == [0, 1] and one["s_mfu"] > 0
        for name in ("load_max", "load_min", "dropped", "null", "entropy", "top1", "aux", "z"):
            assert two[name] == pytest.approx(one[name], rel=1e-5), name
            assert name == "load_min" or all(value > 0 for value in one[name])
        assert "ep_load_max" not in one and all(1 <= value <= 2 for value in two["ep_load_max"])
    assert [picture is not None for _, picture in together] == [False, False, True]
    (_, here), (_, there) = alone[2], together[2]
    assert isinstance(here, Picture) and isinstance(there, Picture)
    assert np.abs(here.pixels.astype(int) - there.pixels).max() <= 1, "the loads are equal to 1e-5"
