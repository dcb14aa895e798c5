"""Readings: the arithmetic of pentad's own ones, and that a new metric is one file, also outside the package."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pentad.configs.errors import UserError
from pentad.configs.schema import LogConfig, MemoryConfig, MoeConfig
from pentad.models.costs.flops import step_flops
from pentad.models.costs.recompute import flops_again
from pentad.parallel.record.ring import Recorder
from pentad.trainer.memory.estimate import per_rank
from pentad.trainer.metrics.evaluation import HELD_OUT_LOSS, sample_metric
from pentad.trainer.metrics.metric import Metric
from pentad.trainer.metrics.readings import registry
from pentad.trainer.metrics.readings.memory import device_memory, peak_memory_gib
from pentad.trainer.metrics.readings.protocol import OnRank, Reading, RunFacts, StepDone
from pentad.trainer.metrics.readings.registry import BUILT_IN, Readings, register
from pentad.trainer.numerics.bad_steps import NON_FINITE
from pentad.trainer.recovery.recovered import LOST_STEPS, MTTR
from tests.distributed import run_distributed
from tests.trainer.checkpoint.test_resume import text_job
from tests.trainer.metrics.reports import DONE, facts, read, values
from tests.trainer.metrics.test_reporting import _train as train
from tests.training import job

DOCS = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text()


@pytest.fixture(autouse=True)
def own() -> Generator[list[type[Reading]]]:
    """The registered readings, none at first."""
    before, registry._registered[:] = registry._registered[:], []
    yield registry._registered
    registry._registered[:] = before


def test_speeds_and_shares() -> None:
    found = values(read(facts(devices=4)))
    assert (found["tokens"], found["skipped"], found["done_pct"]) == (1800, 1, 70.0)
    assert (found["tokens_per_s"], found["tokens_per_s_per_device"]) == (400, 100)
    assert (found["data_s"], found["data_pct"], found["memory_gib"]) == (0.1, pytest.approx(5.0), 1.5)
    assert found["memory_model_gib"] == max(memory.tensors for memory in per_rank(job())) / 2**30


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_utilization_is_the_models_flops_over_what_the_devices_could_do(recompute: str) -> None:
    cfg = replace(job(), memory=MemoryConfig(recompute=recompute))  # type: ignore[arg-type]
    found = read(facts(cfg, devices=4, peak_tflops=50.0)).row
    most = 2.0 * 4 * 50e12
    flops, whole = (step_flops(cfg.model, 800, pairs).total for pairs in (6000.0, 8 * 16**2))
    again = flops_again(cfg.model, 800, 6000.0, dict.fromkeys(range(cfg.model.layers), "full"))
    assert found["mfu"] == pytest.approx(flops / most, rel=1e-12)
    assert found["mfu_full"] == pytest.approx(whole / most, rel=1e-12)
    assert found["hfu"] == pytest.approx((flops + (again if recompute == "full" else 0)) / most, rel=1e-12)
    assert again > flops / 10 and found["tflops_per_device"] == pytest.approx(flops / 8e12, rel=1e-12)


def test_products_in_eight_bits_are_held_against_a_peak_of_their_own() -> None:
    cfg = job(fp8="row")
    run, most = replace(facts(cfg, devices=4, peak_tflops=50.0), peak_fp8_tflops=100.0), 2.0 * 4 * 50e12
    flops = step_flops(cfg.model, 800, 6000.0)
    eight_bit = (flops.projections + flops.ffn) * 2 / 3  # weight gradients are not
    row = read(run).row
    assert row["mfu"] == pytest.approx(flops.total / most, rel=1e-12)
    assert row["mfu_fp8"] == pytest.approx((flops.total - eight_bit / 2) / most, rel=1e-12)
    for one in (replace(run, peak_fp8_tflops=None), replace(run, cfg=job())):
        assert read(one).row["mfu_fp8"] is None


def test_an_unknown_peak_gives_no_utilization() -> None:
    row = read(facts(peak_tflops=None)).row
    assert [row[key] for key in ("mfu", "mfu_full", "hfu", "peak_tflops")] == [None] * 4
    assert row["tflops_per_device"] > 0


def test_memory_of_this_process() -> None:
    assert 0 < peak_memory_gib() < 1e4


def test_memory_of_a_device_by_its_allocators_counts() -> None:
    keys = ("allocated_bytes.all.peak", "reserved_bytes.all.peak", "num_alloc_retries", "num_ooms")
    stats: dict[str, int] = dict(zip(keys, (3 << 30, 4 << 30, 2, 1), strict=True))
    assert device_memory(stats, 8 << 30) == (3.0, 37.5, 4.0, 2, 1)
    shown = values(Readings(facts(), BUILT_IN).step(DONE, (0.1, *device_memory(stats, 8 << 30), 0.0)))
    keys = ("memory_gib", "memory_pct", "memory_reserved_gib", "memory_retries", "memory_ooms", "hb_age_max_ms")
    assert [shown[key] for key in keys] == [3.0, 37.5, 4.0, 2, 1, None]
    cpu = values(read(facts()))
    assert [cpu[key] for key in keys] == [1.5, None, None, None, None, pytest.approx(30.0)]
    assert cpu["fault_epoch"] == 0 and values(read(replace(facts(), epoch=2)))["fault_epoch"] == 2


def test_the_longest_silence_of_a_rank_is_asked_for_once() -> None:
    vitals = Recorder(None, rank=0, world=1, entries=1).vitals
    assert vitals.longest_silence_s() == 0, "it gives no signs of life"
    vitals.beat()
    time.sleep(0.05)
    vitals.beat()
    assert 0.05 <= vitals.longest_silence_s() < 5
    before = time.monotonic()
    vitals.beat()
    assert vitals.longest_silence_s() <= time.monotonic() - before + 0.05
    time.sleep(0.05)
    assert vitals.longest_silence_s() >= 0.05, "the one that goes on counts"


# A metric in a file of one's own ------------------------------------------------------------------------------


def documented() -> str:
    """The module that docs/metrics.md shows."""
    (code,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    return code


def imported(folder: Path, code: str) -> ModuleType:
    """A module from a file that is part of no package."""
    file = folder / "my_metrics.py"
    file.write_text(code)
    spec = spec_from_file_location("my_metrics", file)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_new_metric_is_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The example of the docs, in metrics.jsonl, on the console and in both trackers."""
    pytest.importorskip("tensorboard")
    wandb = pytest.importorskip("wandb")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "absent"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged, log = [], wandb.Run.log

    def kept(self: Any, data: dict[str, Any], **kwargs: Any) -> None:
        logged.append(data["loss/perplexity"])
        log(self, data, **kwargs)

    monkeypatch.setattr(wandb.Run, "log", kept)
    imported(tmp_path, documented())
    cfg = replace(text_job(tmp_path), log=LogConfig(tensorboard=True, wandb=True))
    cfg = replace(cfg, train=replace(cfg.train, steps=3))
    run = tmp_path / "run"
    expected = [pytest.approx(2.718281828459045 ** row["loss"], rel=1e-6) for row in train(0, 1, cfg, run)]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["perplexity"] for row in rows] == expected and len(rows) == 3
    titles, *lines = [line.split() for line in capsys.readouterr().out.splitlines() if "/" in line.split()[0]]
    at = titles.index("ppl")
    assert [float(line[at]) for line in lines] == [pytest.approx(row["perplexity"], rel=0.01) for row in rows]
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss/perplexity")] == expected
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    assert logged == expected and b"loss/perplexity" in file.read_bytes()


class Furthest(Reading):
    """The largest number that a rank has."""

    metrics = (Metric("furthest", "made up"), Metric("both", "made up"))
    watched = 2

    def watch(self, mine: OnRank) -> Sequence[float]:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        return (10.0 * rank + mine.step, -rank)

    def step(self, done: StepDone) -> Mapping[str, Any]:
        return {"furthest": torch.tensor(done.worst[0]), "both": {"sum": sum(done.worst)}}


def _train_with(rank: int, world: int, *args: Any) -> list[dict[str, Any]]:
    registry._registered[:] = [Furthest]
    try:
        return train(rank, world, *args)
    finally:
        registry._registered.clear()


@pytest.mark.distributed
def test_a_reading_watches_every_rank(tmp_path: Path) -> None:
    cfg = text_job(tmp_path, dp=2)
    cfg = replace(cfg, train=replace(cfg.train, steps=2))
    rows = run_distributed(_train_with, 2, cfg, tmp_path / "run", group=False)[0]
    assert [row["both"] for row in rows] == [{"sum": row["furthest"]} for row in rows]
    assert all(isinstance(row["furthest"], float) and row["memory_gib"] > 0 for row in rows)
    assert rows[1]["furthest"] - rows[0]["furthest"] == 1


# Mistakes -----------------------------------------------------------------------------------------------------


def _reading(*metrics: Metric, name: str = "Made") -> type[Reading]:
    return type(name, (Reading,), {"metrics": metrics, "step": lambda self, done: {}, "__module__": "mine"})


def test_two_readings_with_one_key(own: list[type[Reading]]) -> None:
    first = register(_reading(Metric("a", "", tracker="x/a"), name="First"))
    assert register(first) is first and own == [first]
    second = _reading(Metric("a", ""), Metric("loss", ""), Metric("b", "", tracker="loss/val"), Metric("b", ""))
    with pytest.raises(UserError) as caught:
        register(second)
    assert [str(problem) for problem in caught.value.problems] == [
        "reading mine.Made: key 'a' is that of mine.First; give another one",
        "reading mine.Made: key 'loss' is that of pentad.trainer.metrics.readings.progress.ProgressReading; "
        "give another one",
        "reading mine.Made: key 'b' is that of another metric of the same reading; give another one",
        "reading mine.Made: tracker 'loss/val' is that of the evaluation; give another one",
    ]
    assert own == [first]


class Failing(Reading):
    """Fails where it is told to."""

    metrics = (Metric("whole", "made up"),)
    watched = 1
    where = ""

    def __init__(self, run: RunFacts) -> None:
        super().__init__(run)
        self.fail("init")

    def fail(self, where: str) -> None:
        if where == self.where:
            raise KeyError(f"in {where}")

    def watch(self, mine: OnRank) -> Sequence[float]:
        self.fail("watch")
        return () if self.where == "count" else (3.0,)

    def step(self, done: StepDone) -> Mapping[str, Any]:
        self.fail("step")
        return {"hole": 1.0} if self.where == "key" else {"whole": done.worst[0]}

    def close(self) -> None:
        self.fail("close")


class AfterIt(Reading):
    """Gets its own number, whatever the one before it does."""

    metrics = (Metric("after", "made up"),)
    watched = 1

    def watch(self, mine: OnRank) -> Sequence[float]:
        return (5.0,)

    def step(self, done: StepDone) -> Mapping[str, Any]:
        return {"after": done.worst[0]}


@pytest.mark.parametrize("where", ["", "init", "watch", "count", "step", "key", "close"])
def test_a_reading_that_fails_is_left_out(
    where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Failing, "where", where)
    readings, rows = Readings(facts(), (Failing, AfterIt)), []
    for step in (1, 2):
        worst = readings.watch(OnRank(step=step, data_s=0.0))
        rows.append(readings.step(replace(DONE, step=step), worst).row)
    readings.close()
    known = None if where not in ("", "close") else 3.0
    assert rows == [{"whole": known, "after": 5.0}] * 2
    said = capsys.readouterr().err
    assert said.count("Failing failed and is left out from now on") == bool(where), "told once"


def test_what_fails_of_pentads_own_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Failing, "where", "step")
    monkeypatch.setattr(registry, "BUILT_IN", (Failing,))
    readings = Readings(facts(), (Failing,))
    with pytest.raises(KeyError, match="in step"):
        readings.step(DONE, readings.watch(OnRank(step=1, data_s=0.0)))


# The documentation --------------------------------------------------------------------------------------------


def test_the_documented_tables_are_those_of_the_metrics() -> None:
    metrics = Readings(facts(job(model={"moe": MoeConfig(experts=4)})), BUILT_IN).metrics
    for in_file, section in ((True, "## metrics.jsonl"), (False, "### Beside the file")):
        wanted = [
            *metrics,
            *([] if in_file else [HELD_OUT_LOSS, NON_FINITE, replace(sample_metric(0), tracker="samples/N")]),
            *([] if in_file else [MTTR, LOST_STEPS]),
        ]
        expected = [_row(metric) for metric in wanted if metric.in_file == in_file]
        text = DOCS.split(f"{section}\n")[1].split("\n#")[0]
        assert [line for line in text.splitlines() if line.startswith("| `")] == expected


def _row(metric: Metric) -> str:
    title = metric.column.title if metric.column is not None else ""
    place = f"`{title}`" if title else "a line" if metric.line is not None else ""
    tracker = f"`{metric.tracker}`" if metric.tracker else ""
    first = [f"`{metric.key}`", metric.unit] if metric.in_file else []
    cells = [*first, tracker, place, metric.text] if metric.in_file else [tracker, metric.unit, place, metric.text]
    return "| " + " | ".join(cells) + " |"


def test_readings_and_what_is_read_without_training_need_no_torch() -> None:
    modules = ("readings", "sinks", "summary", "curves", "evaluation")
    imports = ", ".join(f"pentad.trainer.metrics.{module}" for module in modules)
    code = f"import sys, {imports}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
