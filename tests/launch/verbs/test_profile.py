"""`pentad profile`: a job's steps by module, with its whole layout; the rows sum to the step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

JOB = """
name: small
model: {family: llama, layers: 2, hidden: 64, heads: 2, kv_heads: 2, ffn: 128, vocab: 320}
parallel: {tp: 2, pp: 2}
train: {steps: 70, global_batch: 4, micro_batch: 2, seq_len: 64, dtype: fp32}
optim: {name: adamw, lr: 1.0e-3}
data: {name: stdlib}
hardware: {peak_tflops: 0.05}
"""


@pytest.mark.slow
def test_the_rows_of_a_job_sum_to_its_step(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    code = "import sys; from pentad.launch.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "profile", "job.yaml", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rows = {row["what"]: row for row in found["rows"]}
    assert sum(row["seconds"] for row in found["rows"]) == pytest.approx(found["step_s"], rel=0.05)
    assert sum(row["share"] for row in found["rows"]) == pytest.approx(1)
    for name in (
        "forward attention",
        "backward ffn",
        "forward head",
        "optimizer",
        "reduce_scatter tp",
        "receive channel",
    ):
        assert rows[name]["seconds"] > 0, sorted(rows)
    assert rows["forward ffn"]["bound"] in ("compute", "memory") and 0 < rows["forward ffn"]["of_roofline"] < 1
    assert found["memory_gb_s"] > 0.5 and not (tmp_path / "runs").exists()
