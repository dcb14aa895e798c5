"""A real run with Weights & Biases and one slow rank: it logs the MFU, where the time went, and who is slow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from tests.wandb_file import read_offline

JOB = """
name: slow
model: {family: llama, layers: 2, hidden: 32, heads: 2, kv_heads: 2, ffn: 64, vocab: 320}
parallel: {dp: 2}
train: {steps: 70, global_batch: 4, micro_batch: 2, seq_len: 32, dtype: fp32}
optim: {name: adamw, lr: 1.0e-3}
data: {name: stdlib}
hardware: {peak_tflops: 0.05}
checkpoint: {final: false}
log: {wandb: true}
"""
SLOW_RANK = """
import os
import time

from pentad.trainer.metrics.readings import OnRank, Reading, StepDone, register


@register
class SlowRank(Reading):
    watched = 1

    def watch(self, mine: OnRank):
        if os.environ.get("RANK") == "1":
            time.sleep(0.1)
        return (0.0,)

    def step(self, done: StepDone):
        return {}
"""


@pytest.mark.slow
def test_an_offline_run_has_logged_its_mfu_its_waterfall_and_its_straggler(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "slow_rank.py").write_text(SLOW_RANK)
    left = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    env = left | {"NETRC": str(tmp_path / "absent"), "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pentad.launch.cli", "train", "job.yaml", "--import", "slow_rank.py"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "slow"
    rows, alerts = read_offline(run)
    assert [row["_step"] for row in rows] == list(range(1, 71))
    assert all(row["perf/mfu"] > 0 for row in rows)
    shares = [{k: v for k, v in row.items() if k.startswith("waterfall/") and k.count("/") == 1} for row in rows[1:]]
    which = [parts.pop("waterfall/step") + parts.pop("waterfall/steps") for parts in shares]
    assert which == list(range(2, 71)) and all(sum(parts.values()) == pytest.approx(1, abs=1e-4) for parts in shares)
    for before, row in pairwise(rows[5:]):  # a line has the waterfall of the step before
        assert row["waterfall/mfu_if_free/straggler"] > 1.1 * before["perf/mfu"]
    windows = [row for row in rows if "straggler/score_min" in row]
    assert len(windows) == 3
    for row in windows:
        assert row["straggler/rank"] == row["straggler/slowest_rank"] == 1
        assert row["straggler/class"] == "compute"
        assert row["straggler/cost_pct"] > 20 and row["straggler/score_min"] < 0.8
        assert row["wait/dp_ms/p99"] >= row["wait/dp_ms/p50"] > 0
        assert row["perf/mfu_if_no_straggler"] > row["perf/mfu"]
    assert windows[-1]["straggler/n_flagged"] == 1
    pictures = [row["straggler/heat_map/path"] for row in rows if "straggler/heat_map/path" in row]
    (folder,) = (run / "wandb").glob("offline-run-*/files")
    assert pictures and all((folder / path).stat().st_size > 1000 for path in pictures)
    ((title, text),) = alerts
    assert title == "straggler: rank 1" and "slower than its peers (compute)" in text
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (told,) = [event for event in events if event["event"] == "straggler"]
    assert told["rank"] == 1 and told["reason"] == "compute" and told["confirmed"]
    assert text in done.stdout and "  where  " in done.stdout and " r1 +" in done.stdout
    assert (run / "waterfall.png").exists() and (run / "stragglers.png").exists()
