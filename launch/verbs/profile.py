"""`pentad profile`: the time of a job's steps by module, held against what the devices could do; of a run what its own
record has of that, by operation at least."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...configs import Config, Problem, UserError, load
from ...parallel.record.files import read_index, read_ring
from ...parallel.record.modules import (
    BACKWARD,
    FORWARD,
    WHOLE_BACKWARD,
    WHOLE_FORWARD,
    by_module,
    operation_names,
    recorded_steps,
    whole_steps,
)
from ...parallel.record.reader import RecordError, RecordRing
from ...parallel.record.verdict_words import Places
from ...trainer.metrics.module_costs import Work, module_work
from ...trainer.metrics.summary import lines_of
from ...trainer.run_folder import RunFile
from ..supervise.worker_files import read_places
from .quietly import output_to_stderr

_WARM_UP, _STEPS = 3, 5
_LAST = 20
"""Steps of a run's record that are averaged."""
_BY_OPERATION = (
    "by operation: its modules were not recorded (log.modules; pentad profile CONFIG runs some steps with them)"
)


def profile(config: str, overrides: Sequence[str], *, imports: Sequence[str] = (), as_json: bool = False) -> int:
    """Prints where the time of steps goes: of a run from its record, of a job by running some with modules recorded.

    Args:
        config: a run's folder, a YAML file, or the name of a job that comes with Pentad.
        overrides: `key=value`, of a job.
        imports: modules that every rank imports.
        as_json: one JSON object.

    Returns:
        The exit code of the job.

    Raises:
        UserError: what is wrong with the config; the record does not hold whole steps.
    """
    if Path(config).is_dir():
        found, code = profile_of_run(Path(config), overrides), 0
    else:
        found, code = _of_job(config, overrides, imports)
    if found is not None:
        print(json.dumps(found, indent=2) if as_json else "\n".join(profile_lines(found)))
    return code


def profile_of_run(run: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What the record of a run tells: of the steps whose modules it has, else of its last ones by operation.

    Raises:
        UserError: the record has no whole step of all ranks; overrides, which change nothing of what has been.
    """
    resolved = run / RunFile.RESOLVED
    if overrides:
        message = f"{overrides[0]!r} changes nothing of a run that has been; give {resolved} to run its job anew"
        raise UserError(Problem("overrides", message))
    if not resolved.is_file():
        raise UserError(Problem("RUN", f"{run} is no folder of a run: it has no {RunFile.RESOLVED}"))
    try:
        return measured(load(str(resolved), []), run)
    except (OSError, RecordError) as error:
        raise UserError(f"{run}: its record cannot be read ({error}); give {resolved} to run its job anew") from None


def _of_job(config: str, overrides: Sequence[str], imports: Sequence[str]) -> tuple[dict[str, Any] | None, int]:
    from ..supervise.launcher import train

    with tempfile.TemporaryDirectory(prefix="pentad-profile-") as folder:
        steps = list(range(_WARM_UP + 1, _WARM_UP + _STEPS + 1))
        own = [
            *overrides, f"runs_dir={folder}", "name=profile", f"checkpoint.dir={folder}/profile/checkpoints",
            f"train.steps={steps[-1]}", f"log.modules={steps}", "log.wandb=false", "log.tensorboard=false",
            "log.prometheus=null",
            "checkpoint.every=0", "checkpoint.final=false", "checkpoint.resume=null", "eval.every=0",
            f"log.every={steps[-1]}",
        ]  # fmt: skip
        cfg = load(config, own)
        with output_to_stderr():
            code = train(config, own, imports=imports)
        if code:
            return None, code
        found = measured(cfg, Path(folder) / "profile")
    if found["by"] != "module":
        held = cfg.faults.record_entries
        raise UserError(
            Problem("faults.record_entries", f"{held} entries do not hold a step with its modules; raise it")
        )
    return found, 0


def _common(rings: Sequence[RecordRing], steps_of: Callable[[RecordRing], list[int]]) -> list[int]:
    """The steps that all ranks have."""
    return sorted(set.intersection(*({*steps_of(ring)} for ring in rings))) if rings else []


def measured(cfg: Config, run: Path) -> dict[str, Any]:
    """What a run's record tells: means over steps and ranks.

    Raises:
        UserError: its record has no step of which all is there.
    """
    index = read_index(run)
    newest = max((file.epoch for file in index), default=0)
    rings = [read_ring(run, file) for file in index if file.epoch == newest]
    whole = _common(rings, whole_steps)
    modules = [step for step in _common(rings, recorded_steps) if step in whole]
    steps = modules or whole[-_LAST:]
    if not steps:
        held = max((len(whole_steps(ring)) for ring in rings), default=0)
        raise UserError(
            f"the record of {run} has no step of which all {len(rings)} ranks have everything (a rank has at most "
            f"{held}); raise faults.record_entries={cfg.faults.record_entries} and run more than one step"
        )
    places = read_places(run, len(rings))
    sums: dict[str, float] = {}
    whole = 0.0
    for ring in rings:
        for step in steps:
            parts, seconds = by_module(ring, step, () if modules else _operations(places, ring.header.rank))
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
        "steps": [step + 1 for step in steps],
        "by": "module" if modules else "operation",
        "rows": _rows(cfg, {label: value / count for label, value in sums.items()}, peak, bandwidth),
    }


def _operations(places: Places, rank: int) -> list[str]:
    """Names for the operations of a rank; none where the run's program cannot be read."""
    if not places.programs:
        return []
    try:
        return operation_names(places.programs[places.stage(rank)], staged=len(places.programs) > 1)
    except ValueError:  # a program of another version, or of somebody's own operations
        return []


def _work(cfg: Config) -> dict[str, Work]:
    """By module, and of whole passes."""
    found = module_work(cfg)
    for label, way in ((WHOLE_FORWARD, FORWARD), (WHOLE_BACKWARD, BACKWARD)):
        parts = [work for name, work in found.items() if name.startswith(way)]
        found[label] = Work(sum(work.flops for work in parts), sum(work.nbytes for work in parts))
    return found


def _rows(cfg: Config, seconds: dict[str, float], peak: float | None, bandwidth: float) -> list[dict[str, Any]]:
    work, whole = _work(cfg), sum(seconds.values())
    if "backward weights" in seconds:  # a pass in two, of which nobody knows what each half of it moves
        del work[WHOLE_BACKWARD]
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
    steps = found["steps"]
    many = f"steps {steps[0]} to {steps[-1]}" if len(steps) > 1 else f"step {steps[0]}"
    by = "" if found["by"] == "module" else f", {_BY_OPERATION}"
    lines = [
        f"{many}{by}",
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
