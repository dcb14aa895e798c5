"""`pentad profile`: the time of a job's steps by module, held against what the devices could do."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...configs import Config, UserError, load
from ...parallel.record.files import read_index, read_ring
from ...parallel.record.modules import by_module, recorded_steps
from ...trainer.metrics.module_costs import module_work
from ...trainer.metrics.summary import lines_of
from ...trainer.run_folder import RunFile
from .quietly import output_to_stderr

_WARM_UP, _STEPS = 3, 5


def profile(config: str, overrides: Sequence[str], *, imports: Sequence[str] = (), as_json: bool = False) -> int:
    """Runs a few steps of a job with its modules recorded, and prints where their time goes.

    Args:
        config: a run's folder, a YAML file, or the name of a job that comes with Pentad.
        overrides: `key=value`.
        imports: modules that every rank imports.
        as_json: one JSON object.

    Returns:
        The exit code of the job.

    Raises:
        UserError: what is wrong with the config; the job's record does not hold the steps.
    """
    from ..supervise.launcher import train

    given = Path(config)
    source = str(given / RunFile.RESOLVED) if (given / RunFile.RESOLVED).is_file() else config
    with tempfile.TemporaryDirectory(prefix="pentad-profile-") as folder:
        steps = list(range(_WARM_UP + 1, _WARM_UP + _STEPS + 1))
        own = [
            *overrides, f"runs_dir={folder}", "name=profile", f"checkpoint.dir={folder}/profile/checkpoints",
            f"train.steps={steps[-1]}", f"log.modules={steps}", "log.wandb=false", "log.tensorboard=false",
            "log.prometheus=null",
            "checkpoint.every=0", "checkpoint.final=false", "checkpoint.resume=null", "eval.every=0",
            f"log.every={steps[-1]}",
        ]  # fmt: skip
        cfg = load(source, own)
        with output_to_stderr():
            code = train(source, own, imports=imports)
        if code:
            return code
        found = measured(cfg, Path(folder) / "profile")
    print(json.dumps(found, indent=2) if as_json else "\n".join(profile_lines(found)))
    return 0


def measured(cfg: Config, run: Path) -> dict[str, Any]:
    """What a run that has recorded its modules tells: means over its steps and ranks.

    Raises:
        UserError: its record has no entries of modules.
    """
    rings = [read_ring(run, file) for file in read_index(run)]
    steps = sorted(set.intersection(*({*recorded_steps(ring)} for ring in rings))) if rings else []
    if not steps:
        raise UserError(f"the record of {run} has no step with modules; raise faults.record_entries")
    sums: dict[str, float] = {}
    whole = 0.0
    for ring in rings:
        for step in steps:
            parts, seconds = by_module(ring, step)
            whole += seconds
            for label, value in parts.items():
                sums[label] = sums.get(label, 0.0) + value
    count = len(rings) * len(steps)
    rows = lines_of(run / RunFile.METRICS)
    peak = next((row["peak_tflops"] for row in reversed(rows) if row.get("peak_tflops")), None)
    lengths = [row["step_time_s"] for row in rows if row["step"] - 1 in steps]
    bandwidth = memory_rate()
    return {
        "step_s": float(np.mean(lengths)),
        "recorded_s": whole / count,
        "peak_tflops": peak,
        "memory_gb_s": bandwidth / 1e9,
        "rows": _rows(cfg, {label: value / count for label, value in sums.items()}, peak, bandwidth),
    }


def _rows(cfg: Config, seconds: dict[str, float], peak: float | None, bandwidth: float) -> list[dict[str, Any]]:
    work, whole = module_work(cfg), sum(seconds.values())
    rows = []
    for label in sorted(seconds, key=lambda label: -seconds[label]):
        row: dict[str, Any] = {"what": label, "seconds": seconds[label], "share": seconds[label] / whole}
        if label in work and peak:
            bound_s, bound = work[label].bound_s(peak * 1e12, bandwidth)
            row |= {
                "tflops": work[label].flops / seconds[label] / 1e12,
                "intensity": work[label].intensity,
                "bound": bound,
                "of_roofline": bound_s / seconds[label],
            }
        rows.append(row)
    return rows


def memory_rate() -> float:
    """Bytes a second that this machine's memory moves: a copy of 64 MiB reads and writes them."""
    source = np.ones(8 << 20)
    target = np.empty_like(source)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - begin)
    return 2 * source.nbytes / best


def profile_lines(found: dict[str, Any]) -> list[str]:
    """For people."""
    peak = f"peak {found['peak_tflops']:.4g} TFLOP/s, " if found["peak_tflops"] else ""
    lines = [
        f"a step takes {1e3 * found['step_s']:.2f} ms; the rows, means of all ranks, sum to "
        f"{1e3 * found['recorded_s']:.2f} ms",
        f"{peak}memory {found['memory_gb_s']:.1f} GB/s",
        "",
        f"{'':32}{'ms':>9}{'%':>7}{'TFLOP/s':>10}{'FLOP/byte':>11}  {'bound by':9}{'of bound':>9}",
    ]
    for row in found["rows"]:
        line = f"{row['what']:32}{1e3 * row['seconds']:9.3f}{100 * row['share']:7.1f}"
        if "bound" in row:
            line += f"{row['tflops']:10.4f}{row['intensity']:11.1f}  {row['bound']:9}{100 * row['of_roofline']:8.0f}%"
        lines.append(line)
    return lines
