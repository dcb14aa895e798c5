"""Sinks: what a resumed run leaves in the files, how often W&B is called, what TensorBoard can read."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import resource
import socket
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pentad.configs.errors import UserError
from pentad.configs.schema import LogConfig
from pentad.trainer.metrics.evaluation import HELD_OUT_LOSS, on_one_line, sample_metric
from pentad.trainer.metrics.metric import Alert, Metric
from pentad.trainer.metrics.report import Report
from pentad.trainer.metrics.sinks import EventLog, SinkSet, make_sinks
from pentad.trainer.metrics.sinks.console import ConsoleSink
from pentad.trainer.metrics.sinks.jsonl import JsonlSink
from pentad.trainer.metrics.sinks.wandb import WandbSink
from tests.trainer.metrics.reports import report
from tests.wandb_file import read_offline

KEYS = {
    *("step", "loss", "grad_norm", "lr", "tokens", "step_time_s", "tokens_per_s", "tokens_per_s_per_device", "mfu"),
    *("mfu_full", "hfu", "tflops_per_device", "peak_tflops", "memory_gib", "data_s", "waterfall", "straggler", "moe"),
    *("skipped", "mfu_fp8", "memory_model_gib", "loss_max_rank"),
}


ALERT = Metric("told", "", in_file=False, tracker="told")


def held_out(step: int, loss: float) -> Report:
    return Report.of(step, [(HELD_OUT_LOSS, loss)])


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_jsonl_is_readable_after_every_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    for step in (1, 2, 3):
        sink.log(report(step=step))
        assert [row["step"] for row in rows(path)] == list(range(1, step + 1))
    assert all(set(row) == KEYS for row in rows(path))
    sink.close()


def test_jsonl_has_each_step_once_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonlSink(path)
    for step in range(1, 8):
        first.log(report(step=step, loss=1.0))
    first.close()
    with open(path, "a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    second = JsonlSink(path, resume_step=5)
    assert [row["step"] for row in rows(path)] == [1, 2, 3, 4, 5]
    for step in range(6, 11):
        second.log(report(step=step, loss=2.0))
    second.close()
    assert [(row["step"], row["loss"]) for row in rows(path)] == [(s, 1.0 if s <= 5 else 2.0) for s in range(1, 11)]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_new_run_moves_the_old_metrics_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for loss in (1.0, 2.0):
        sink = JsonlSink(path)
        sink.log(report(step=1, loss=loss))
        sink.close()
    assert [row["loss"] for row in rows(path)] == [2.0]
    assert [row["loss"] for row in rows(tmp_path / "metrics.previous.jsonl")] == [1.0]


def test_events_append_across_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"time": 1.0, "event": "start"}\n{"time": 2.0, "ev')
    events = EventLog(path)
    events.log("checkpoint", step=10, path=tmp_path, loss=float("nan"))
    events.close()
    lines = path.read_text().splitlines()
    assert len(lines) == 3
    last = json.loads(lines[2])
    assert (last["event"], last["step"], last["path"], last["loss"]) == ("checkpoint", 10, str(tmp_path), None)


def test_jsonl_is_strict_and_knows_no_value_as_null(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.log(report(loss=float("nan"), waterfall={"compute": float("inf")}))
    sink.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert row["loss"] is None and row["waterfall"] == {"compute": None}
    assert row["straggler"] is None and row["moe"] is None


def test_tracker_keys() -> None:
    found = report(mfu=None, eta_s=61.0)
    assert set(found.tracked) == {
        *("loss/train", "optim/grad_norm", "optim/lr/all", "optim/skipped"),
        *("perf/mfu_full", "perf/hfu", "perf/tflops_per_gpu", "perf/tokens_per_s", "perf/tokens_per_s_per_gpu"),
        *("perf/step_s", "perf/data_s", "perf/data_pct", "mem/active_gib"),
        *("progress/tokens", "progress/pct", "progress/eta_s"),
    }
    assert held_out(7, 2.0).tracked == {"loss/val": 2.0}
    assert report(waterfall={"compute": 0.5, "wait": None}).tracked["waterfall/compute"] == 0.5


def test_what_follows_on_a_step_has_lines_of_its_own() -> None:
    stream = io.StringIO()
    sink = ConsoleSink(10, stream=stream)
    sink.add(held_out(7, 2.0))
    sink.add(Report.of(7, [(sample_metric(0), on_one_line("Once", "upon\na time"))]))
    assert stream.getvalue().splitlines() == ["held-out loss after step 7: 2.0000", "sample: Once … upon\\na time"]


def _offline(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(home / "absent"))
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_wandb_offline_logs_once_a_step_and_resumes_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    _offline(monkeypatch, tmp_path)
    run_dir = tmp_path / "demo"
    ids = []
    for resume_step in (0, 3, 0):
        sink = WandbSink("pentad", run_dir, {"train": {"steps": 10}}, resume_step)
        calls: list[tuple[int | None, Mapping[str, Any]]] = []
        log = sink.run.log

        def counted(
            data: dict[str, Any], step: int | None = None, calls: list[Any] = calls, log: Any = log, **kwargs: Any
        ) -> None:
            calls.append((step, data))
            log(data, step=step, **kwargs)

        monkeypatch.setattr(sink.run, "log", counted)
        axes, define = {}, sink.run.define_metric

        def defined(name: str, step_metric: str | None = None, axes: Any = axes, define: Any = define) -> None:
            axes[name] = step_metric
            define(name, step_metric=step_metric)

        monkeypatch.setattr(sink.run, "define_metric", defined)
        for step in range(resume_step + 1, resume_step + 4):
            alert = {ALERT: Alert("slow", f"rank {step}", "straggler", {})} if step == 5 else {}
            sink.log(report(step=step, done_pct=10.0 * step, waterfall={"tp": 0.25}, extra=alert))
        ids.append(sink.run.id)
        assert sink.run.settings.mode == "offline" and sink.run.config["train"] == {"steps": 10}
        assert sink.run.name == "demo"
        sink.close()
        assert axes == {"loss/train": "progress/tokens", "progress/tokens": None}
        assert [step for step, _ in calls] == [resume_step + 1, resume_step + 2, resume_step + 3]
        assert {"loss/train", "progress/tokens", "progress/pct", "perf/mfu"} <= set(calls[0][1])
        logged, alerts = read_offline(run_dir)
        assert [row["_step"] for row in logged] == [step for step, _ in calls]
        assert logged[0]["perf/mfu"] == 0.2 and logged[0]["waterfall/tp"] == 0.25 and "told" not in logged[-1]
        assert alerts == ([("slow", "rank 5")] if resume_step else [])
    assert ids[0] == ids[1] != ids[2]


def test_wandb_without_its_server_logs_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    _offline(monkeypatch, tmp_path)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    init, modes = wandb.init, []

    def unreachable(mode: str | None, **kwargs: Any) -> Any:
        modes.append(mode)
        if mode is None:
            raise wandb.Error("no route to host")
        return init(mode=mode, **kwargs)

    monkeypatch.setattr(wandb, "init", unreachable)
    with pytest.warns(UserWarning, match="no route to host; logging offline"):
        sink = WandbSink("pentad", tmp_path / "run", {})
    sink.log(report())
    sink.close()
    assert modes == [None, "offline"]


def test_tensorboard_files_are_readable(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sinks = make_sinks(LogConfig(tensorboard=True, every=100), tmp_path, {}, total_steps=5)
    for step in range(1, 6):
        sinks.log(report(step=step, loss=10.0 - step))
    sinks.add(held_out(5, 1.0))
    sinks.add(Report.of(5, [(sample_metric(0), "Once … upon")]))
    sinks.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/train")] == [(s, 10.0 - s) for s in range(1, 6)]
    assert [e.tensor_proto.string_val for e in events.Tensors("samples/0/text_summary")] == [["Once … upon".encode()]]
    assert [e.step for e in events.Scalars("loss/val")] == [5]
    assert len(rows(tmp_path / "metrics.jsonl")) == 5


PROMETHEUS = pytest.mark.skipif(
    importlib.util.find_spec("prometheus_client") is None, reason="prometheus-client is not installed"
)


@PROMETHEUS
def test_prometheus_reads_the_newest_step(tmp_path: Path) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    def told(text: str) -> dict[str, float]:
        found = [s for family in text_string_to_metric_families(text) for s in family.samples]
        assert {s.labels["run"] for s in found} == {"named"}
        return {s.name: s.value for s in found}

    file = tmp_path / "node" / "pentad.prom"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for target in (str(file), str(port)):
        sinks = make_sinks(LogConfig(prometheus=target), tmp_path / "named", {}, total_steps=5)
        sinks.log(report(step=4, loss=3.0))
        if target == str(file):
            assert told(file.read_text())["pentad_step"] == 4
        else:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                assert told(answer.read().decode())["pentad_loss_train"] == 3.0
            with pytest.raises(UserError, match=r"log\.prometheus: \d+ cannot be used"):
                make_sinks(LogConfig(prometheus=target), tmp_path / "other", {}, total_steps=5)
        sinks.log(report(step=5, loss=2.0))
        sinks.add(held_out(5, 1.0))
        sinks.close()
    found = told(file.read_text())
    assert (found["pentad_step"], found["pentad_loss_train"], found["pentad_loss_val"]) == (5, 2.0, 1.0)
    assert found["pentad_perf_mfu"] == pytest.approx(0.2)
    assert sorted(path.name for path in file.parent.iterdir()) == ["pentad.prom"]


def test_missing_packages_are_named_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        make_sinks(LogConfig(wandb=True, tensorboard=True, prometheus="9400"), tmp_path / "run", {}, 5)
    assert [p.key for p in caught.value.problems] == ["log.wandb", "log.tensorboard", "log.prometheus"]
    assert "pentad[wandb]" in str(caught.value) and not (tmp_path / "run").exists()


def test_close_reaches_every_sink(tmp_path: Path) -> None:
    closed: list[str] = []

    class Failing:
        def log(self, report: Report) -> None: ...

        def add(self, report: Report) -> None: ...

        def close(self) -> None:
            raise OSError("full")

    class Good(Failing):
        def close(self) -> None:
            closed.append("good")

    sinks = make_sinks(LogConfig(), tmp_path, {}, 5)
    sinks.sinks[:0] = [Failing(), Good()]
    with pytest.raises(OSError, match="full"):
        sinks.close()
    assert closed == ["good"]


def _room(size: int) -> None:
    """What may be written into one file from now on: like a disk that is full, it takes the part that fits."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_full_disk_costs_no_line_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.log("a", n=0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    _room(path.stat().st_size + 10)
    try:
        for n in (1, 2):
            log.log("a", n=n)
    finally:
        _room(before)
    assert len(capsys.readouterr().err.splitlines()) == 1, "told once"
    log.log("a", n=3)
    log.close()
    lines = path.read_text().splitlines()
    found = [json.loads(line)["n"] for line in lines if line.endswith("}")]
    assert found == [0, 1, 2, 3] and len(lines) == 5, "the part that fitted is a line of its own"
    again = EventLog(path)
    _room(path.stat().st_size)
    try:
        again.log("a", n=4)
        again.close()
    finally:
        _room(before)
    assert "lacks its last 1 lines" in capsys.readouterr().err


def test_a_console_that_cannot_be_written_is_told_once_and_the_other_sinks_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        sinks = SinkSet([ConsoleSink(3, stream=full), JsonlSink(tmp_path / "metrics.jsonl")])
        for step in (1, 2, 3):
            sinks.log(report(step=step))
            sinks.add(held_out(step, 1.0))
        assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "ConsoleSink cannot be written (No space left on device)" in error
        with contextlib.suppress(OSError):
            full.close()
