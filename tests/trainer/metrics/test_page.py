"""The page of a run: its numbers are those of the run's files, whatever is in them, and however long they are."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pentad.configs.errors import UserError
from pentad.parallel.record.files import RingFile, write_index
from pentad.trainer.metrics.page import write_page
from pentad.trainer.metrics.page.columns import MOST, line, mean_of, starts_of
from pentad.trainer.metrics.page.write import page
from tests.pages import read_page

EVIL = "</script><img src=x onerror=alert(1)>\"'&\u2028<!--"


def row(step: int, **more: Any) -> dict[str, Any]:
    """A step as a run writes it."""
    return {
        "step": step, "loss": round(5 - step / 100, 4), "grad_norm": 1.0, "lr": 1e-3, "tokens": 64 * step, "skipped": 0,
        "step_time_s": 0.5, "tokens_per_s": 128.0, "mfu": 0.4, "memory_gib": 1.5, "memory_model_gib": 1.25,
        "waterfall": {"step": step - 1, "model": 0.4, "dp": 0.6, "mfu_if_free": {"dp": 1.0}},
        "straggler": None, "moe": None,
    } | more  # fmt: skip


def folder(path: Path, rows: Sequence[Any], events: Sequence[Any] = (), config: str = "") -> Path:
    """A run's folder with such files."""
    path.mkdir()
    for name, lines in (("metrics.jsonl", rows), ("events.jsonl", events)):
        text = "".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in lines)
        (path / name).write_text(text)
    if config:
        (path / "config.resolved.yaml").write_text(config)
    return path


def test_columns_keep_peaks_and_gaps() -> None:
    values = np.sin(np.arange(100_000) / 500)
    values[54_321], values[99_999], values[:200] = 1e6, -1e6, math.nan
    starts = starts_of(len(values))
    drawn = line(values, starts)
    assert len(starts) == MOST == len(drawn["mean"])
    assert max(v for v in drawn["high"] if v is not None) == 1e6
    assert min(v for v in drawn["low"] if v is not None) == -1e6
    assert drawn["mean"][:2] == [None, None] and drawn["mean"][2] is not None
    groups = np.split(values[200:], starts[3:] - 200)
    np.testing.assert_allclose(mean_of(values, starts)[2:], [group.mean() for group in groups], rtol=1e-12)
    assert set(line(values[:MOST], starts_of(MOST))) == {"mean"}  # each point is a step


def test_a_page_has_the_numbers_of_the_files(tmp_path: Path) -> None:
    slower = {"rank": 1, "score": 0.5, "reason": "compute", "confirmed": True, "cost": 0.3}
    rows = [row(step) for step in range(1, 61)]
    for at in (20, 40, 60):
        rows[at - 1]["straggler"] = {"step": at, "slower": [0.0, at / 100], **slower}
    rows[20]["straggler"] = {"step": 20, **slower}  # as repeated between two windows
    rows[29]["loss"], rows[29]["grad_norm"] = None, 50.0
    for each in rows:
        each["moe"] = {"layers": [0, 2], "load_max": [1.5, 2.0], "worst": {"load_max": [2.0, 2], "load_min": [0.1, 0]}}
    events = [
        {"time": 1.7e9, "event": "start", "step": 0, "world": 2},
        {"time": 1.7e9, "event": "evaluation", "step": 50, "loss": 4.6},
        {"time": 1.7e9, "event": "start", "step": 30, "world": 2},
    ]
    run = folder(tmp_path / "run", [*rows, '{"step": 61, "loss": 4.'], events, "name: mine\ntrain:\n  steps: 100\n")
    read = read_page(write_page([run]))
    (found,) = read.content["runs"]
    assert found["name"] == "mine" and found["facts"]["steps"] == "60 of 100"
    for key in ("loss", "grad_norm", "lr", "tokens_per_s", "step_time_s", "mfu", "memory_gib", "memory_model_gib"):
        assert found["lines"][key]["mean"] == [each[key] for each in rows], key
    assert found["x"]["step"] == list(range(1, 61)) and found["x"]["tokens"] == [each["tokens"] for each in rows]
    assert found["x"]["hours"][-1] == pytest.approx(60 * 0.5 / 3600, rel=1e-5)
    assert found["waterfall"]["shares"] == {"model": [0.4] * 60, "dp": [0.6] * 60}
    assert found["waterfall"]["whole"] == {"model": 0.4, "dp": 0.6} and found["waterfall"]["mfu_if_free"] == {"dp": 1.0}
    assert found["stragglers"]["step"] == [20, 40, 60] and found["stragglers"]["values"] == [[0, 0, 0], [20, 40, 60]]
    assert found["stragglers"]["verdicts"][0]["rank"] == 1
    assert found["experts"]["rows"] == ["0", "2"] and found["experts"]["values"][1] == [2.0] * 60
    assert found["held_out"] == [[50, 4.6]] and found["restarts"] == [30]
    assert [event["event"] for event in found["events"]["rows"]] == ["start", "evaluation", "start"]
    assert "program.json" in found["no_drawing"]
    assert all(address in ("", "data:,") for address in read.addresses)


def test_what_ended_a_run_stands_at_its_top(tmp_path: Path) -> None:
    verdict = {
        "time": 1.7e9,
        "event": "verdict",
        "kind": "killed",
        "ranks": [1],
        "line": "rank 1 was killed",
        "code": 137,
    }
    events = [
        {"time": 1.6e9, "event": "start", "step": 0, "world": 2},
        {"time": 1.65e9, "event": "straggler", "step": 2, "rank": 0, "peer": 1, "reason": "network"},
        verdict | {"details": ["  rank 0: waited", EVIL]},
    ]
    run = folder(tmp_path / "run", [row(1), row(2), row(3)], events)
    write_index(run, [RingFile(rank, f"node{rank}", f"/dev/shm/pentad-x-{rank}.ring", 1) for rank in range(2)])
    (found,) = read_page(page([run])).content["runs"]
    assert found["verdict"] == {
        "kind": "killed", "ranks": [1], "hosts": ["node1"], "line": "rank 1 was killed", "time": 1.7e9, "step": 3,
        "details": ["  rank 0: waited", EVIL],
    }  # fmt: skip
    assert found["alerts"] == [[2, "straggler: rank 0 (network, its link with rank 1)"]]
    assert found["facts"]["state"] == "ended by a fault"
    again = [*events, {"time": 1.8e9, "event": "start", "step": 3, "world": 2}]
    for name, said in (("again", again), ("whole", [*again, {"time": 1.9e9, "event": "end", "step": 3}]), ("none", [])):
        (other,) = read_page(page([folder(tmp_path / name, [row(1)], said)])).content["runs"]
        assert other["verdict"] is None and other["facts"]["state"] != "ended by a fault"
    odd = {"event": "verdict", "ranks": [True, "x", 5], "details": {}, "line": [EVIL], "time": EVIL}
    (strange,) = read_page(page([folder(tmp_path / "odd", [], [odd], "name: odd\n")])).content["runs"]
    assert (strange["verdict"]["ranks"], strange["verdict"]["details"], strange["verdict"]["step"]) == ([5], [], None)


def test_a_long_run_keeps_its_peaks_and_stays_small(tmp_path: Path) -> None:
    rows = [row(step) for step in range(1, 3001)]
    rows[1234]["grad_norm"] = 777.0
    for at in range(20, 3001, 20):
        rows[at - 1]["straggler"] = {
            "step": at,
            "slower": [0.5 if (at, rank) == (1500, 77) else 0.0 for rank in range(512)],
        }
    text = page([folder(tmp_path / "long", rows, [{"event": "straggler", "step": n} for n in range(3000)])])
    (found,) = read_page(text).content["runs"]
    assert max(found["lines"]["grad_norm"]["high"]) == 777.0 and len(found["x"]["step"]) == MOST
    values, names = found["stragglers"]["values"], found["stragglers"]["rows"]
    assert (max(max(each) for each in values), len(values)) == (50.0, 128)
    assert names[next(i for i, each in enumerate(values) if 50.0 in each)] == "76–79"
    assert found["events"]["total"] == 3000 and len(found["events"]["rows"]) == 400
    assert len(text) < 1 << 20


def test_what_files_say_stays_text(tmp_path: Path) -> None:
    rows = [
        row(1), "[]", "nonsense", "", '{"step": 2',
        json.dumps(row(2, loss="5", mfu=True, waterfall={EVIL: 1, "dp": EVIL})),
        json.dumps(row(3, grad_norm=10**400, straggler={"slower": [EVIL], "step": EVIL}, moe={"load_max": [None, {}]})),
        row(-1), row(2**70), {"step": EVIL}, {"loss": 1.0}, row(3, straggler={"slower": {}}, waterfall=[1]),
    ]  # fmt: skip
    events = [{"event": EVIL, "time": EVIL, "step": EVIL, EVIL: EVIL}, {"event": ["x"], "world": EVIL}, {"time": 1e300}]
    run = folder(tmp_path / "<b>run&", rows, events, f"name: {json.dumps(EVIL)}\nmodel:\n  family: '<u>'\n")
    other = folder(tmp_path / "other", [row(1)])
    read = read_page(page([run, other]))
    assert read.tags.keys() <= {"html", "head", "meta", "link", "title", "style", "body", "main", "noscript", "script"}
    assert read.tags["script"] == 2 and read.handlers == []
    found = read.content["runs"][0]
    assert found["name"] == EVIL and found["x"]["step"] == [1, 2, 3]
    assert found["lines"]["loss"]["mean"] == [4.99, None, 4.97] and found["lines"]["mfu"]["mean"] == [0.4, None, 0.4]


@pytest.mark.parametrize("files", [(), ("metrics.jsonl",), ("metrics.jsonl", "events.jsonl", "program.json")])
def test_a_run_that_has_written_little(tmp_path: Path, files: tuple[str, ...]) -> None:
    run = tmp_path / "young"
    run.mkdir()
    for name in files:
        (run / name).touch()
    with pytest.raises(UserError, match="is no folder of a run"):
        page([run])
    (run / "config.resolved.yaml").write_text("name: young\n")
    (found,) = read_page(page([run])).content["runs"]
    assert (found["steps"], found["waterfall"], found["stragglers"], found["lines"]) == (0, None, None, {})


def test_runs_side_by_side(tmp_path: Path) -> None:
    first = folder(tmp_path / "a", [row(1), row(2)], (), "name: a\ntrain:\n  steps: 2\n  seed: 1\n")
    second = folder(tmp_path / "b", [row(1)], (), "name: b\ntrain:\n  steps: 2\n  seed: 2\n")
    content = read_page(write_page([first, second], tmp_path / "both.html")).content
    assert [run["name"] for run in content["runs"]] == ["a", "b"]
    assert content["differing"] == [["train.seed", "1", "2"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "both.html"]
