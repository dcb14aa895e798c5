"""`pentad probe`: the matrix products of all ranks and the links between them, without a job of one's own."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from ...configs.errors import UserError
from ...trainer.devices.visible import visible_gpus
from ...trainer.metrics.summary import lines_of
from ...trainer.run_folder import RunFile
from .quietly import output_to_stderr

_JOB = {
    "name": "probe",
    "model": {"family": "llama", "layers": 1, "hidden": 32, "heads": 1, "kv_heads": 1, "ffn": 32, "vocab": 320},
    "optim": {"name": "adamw", "lr": 1e-3},
    "data": {"name": "stdlib"},
    "hardware": {"peak_tflops": 1.0},
    "checkpoint": {"final": False},
    "faults": {"probe_at_start": True},
}


def probe_machine(ranks: int | None, dtype: str | None, *, as_json: bool = False) -> int:
    """Tries out this machine's devices, or under a launcher those of all its ranks, and prints who falls short.

    Args:
        ranks: on this machine; none: one for each GPU, on a CPU two. A launcher says itself how many there are.
        dtype: of the products; none: bf16 on GPUs, fp32 on CPUs.
        as_json: one JSON object.

    Returns:
        0: nobody falls short; 1: somebody does, or the ranks did not come to their end.

    Raises:
        UserError: fewer than one rank.
    """
    from ..supervise.launcher import train

    gpus = visible_gpus()
    launched = "WORLD_SIZE" in os.environ or "RANK" in os.environ
    count = int(os.environ.get("WORLD_SIZE", 1)) if launched else ranks if ranks is not None else gpus or 2
    if count < 1:
        raise UserError(f"--ranks={count}: at least 1")
    with tempfile.TemporaryDirectory(prefix="pentad-probe-") as folder:
        chosen = dtype or ("bf16" if gpus else "fp32")
        steps = {"steps": 1, "global_batch": count, "micro_batch": 1, "seq_len": 32, "dtype": chosen}
        job = Path(folder) / "job.yaml"
        job.write_text(json.dumps({**_JOB, "runs_dir": folder, "parallel": {"dp": count}, "train": steps}))
        if launched:
            return train(str(job), [])  # the first rank prints what is found
        with output_to_stderr():
            code = train(str(job), [])
        found = next((e for e in lines_of(Path(folder) / "probe" / RunFile.EVENTS) if e["event"] == "probe"), None)
    if code or found is None:
        return code or 1
    print(json.dumps(found) if as_json else "\n".join(_lines(found)))
    return 1 if found["slow"] else 0


def _lines(found: dict[str, Any]) -> list[str]:
    lines = [f"{'rank':>6}{'TFLOP/s':>12}{'64 KiB, µs':>14}{'8 MiB, GB/s':>14}"]
    for rank, rate in enumerate(found["tflops"]):
        links = f"{found['delay_us'][rank]:14.0f}{found['gb_s'][rank]:14.2f}" if found["delay_us"] else ""
        lines.append(f"{rank:6}{rate:12.4g}{links}")
    return [*lines, *(found["slow"] or ["nobody falls short"])]
