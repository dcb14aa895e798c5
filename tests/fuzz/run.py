"""Runs one case and says what went wrong, if anything did."""

from __future__ import annotations

import math
import shutil
import socket
import time
import traceback
import uuid
from dataclasses import dataclass
from pathlib import Path

from pentad.configs import load
from pentad.launch.memory import estimate
from pentad.trainer.hf_io import export_hf
from pentad.trainer.preflight import preflight
from tests.distributed import run_distributed

from .cases import Case, Layout, as_yaml
from .compare import Difference, Trained, differences, read_run, undetermined, unexplained
from .ranks import train

LIMIT_S = 150.0
"""Seconds that a run may take."""
NUDGES = 3
"""Runs of one process from first parameters that differ in the last place, where a difference has to be explained."""


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Args:
        reason: why it failed; none: it did not.
        seconds: it took.
        rounding: the largest difference beyond the tolerance that rounding explains; 0: none was beyond it.
    """

    reason: str | None
    seconds: float
    rounding: float


def run_case(case: Case, folder: Path) -> Outcome:
    """Trains the case on one process and under both layouts, and compares; files go to `folder`."""
    started, rounding, reason = time.monotonic(), 0.0, None
    try:
        rounding = _run(case, folder)
    except (RunFailed, _Differs) as error:
        reason = str(error)
    except Exception as error:
        reason = "".join(traceback.format_exception(error))
    return Outcome(reason, time.monotonic() - started, rounding)


class RunFailed(Exception):
    """A run that `load` accepted ended with an error."""


class _Differs(Exception):
    """A layout trains something else than one process."""


def _run(case: Case, folder: Path) -> float:
    start = _start(case, folder)
    expected = _trained(case, case.alone, folder, "alone", start)
    if not all(math.isfinite(value) for value in expected.curve.values()):
        raise _Differs(f"one process diverges: {expected.curve}")
    checkpoint = folder / "first" / "run" / "checkpoints" / f"step-{case.resume:08d}"
    first = _trained(case, case.first, folder, "first", start)
    second = _trained(case, case.second, folder, "second", [f"checkpoint.resume={checkpoint}"], since=case.resume)
    dtype = case.alone.config.train.dtype
    free = undetermined(case.alone.config.model)
    found = {
        "first": differences(first, expected, dtype, free),
        "second": differences(second, _since(expected, case.resume), dtype, free),
    }
    if not any(found.values()):
        return 0.0
    nudged = [_trained(case, case.alone, folder, f"nudged-{n}", start, nudge=n) for n in range(NUDGES)]
    noise = [differences(other, expected, dtype, free) for other in nudged]
    for name, beyond in found.items():
        left = unexplained(beyond, noise)
        if left:
            raise _Differs(f"the {name} run differs: {_listed(left)}; rounding alone: {_listed(noise[0]) or 'nothing'}")
    return max(d.size for beyond in found.values() for d in beyond)


def _listed(found: list[Difference]) -> str:
    more = f" and {len(found) - 6} more" if len(found) > 6 else ""
    return ", ".join(f"{d.what} by {d.size:.1e} (allowed {d.allowed:.0e})" for d in found[:6]) + more


def _since(trained: Trained, step: int) -> Trained:
    """The part of the curves after a step."""

    def later(what: str) -> bool:
        return int(what.rpartition(" ")[2]) > step

    return Trained(
        {what: value for what, value in trained.curve.items() if later(what)},
        {what: value for what, value in trained.experts.items() if later(what)},
        trained.tensors,
    )


def _start(case: Case, folder: Path) -> list[str]:
    """Makes the weights that the case starts from; the overrides that name them."""
    if case.origin is None:
        return []
    _run_one(as_yaml(case.origin), 1, folder, "origin", [])
    made = folder / "origin" / "run" / "checkpoints" / "step-00000001"
    if case.start == "hf":
        export_hf(made, folder / "origin" / "hf")
        made = folder / "origin" / "hf"
    return [f"checkpoint.init={made}", *(["checkpoint.upcycle=true"] if case.start == "upcycled" else [])]


def _trained(
    case: Case,
    layout: Layout,
    folder: Path,
    name: str,
    more: list[str],
    *,
    since: int = 0,
    nudge: int | None = None,
) -> Trained:
    run = _run_one(case.yaml(), layout.world, folder, name, [*layout.overrides(), *more], nudge)
    return read_run(run, case.alone.config.train.steps, since)


def _run_one(yaml: str, world: int, folder: Path, name: str, overrides: list[str], nudge: int | None = None) -> Path:
    """Runs a job to its end; its run folder."""
    runs = folder / name
    shutil.rmtree(runs, ignore_errors=True)
    runs.mkdir(parents=True)
    file = runs / "job.yaml"
    file.write_text(yaml)
    run_id = f"fuzz-{uuid.uuid4().hex[:12]}"
    try:
        cfg = load(file, [f"runs_dir={runs}", *overrides], world_size=world)
        preflight(cfg)
        estimate(cfg)  # the rest of what `pentad check` does
        args = (cfg, yaml, _free_port(), run_id, runs, nudge)
        run_distributed(train, world, *args, timeout_s=LIMIT_S, group=False)
    except Exception as error:
        for ring in Path("/dev/shm").glob(f"*{run_id}*"):
            ring.unlink(missing_ok=True)
        raise RunFailed(f"the {name} run: {_told(error)}") from error
    return runs / "run"


def _told(error: Exception) -> str:
    notes = "".join(getattr(error, "__notes__", []))
    return f"{type(error).__name__}: {error}\n{notes}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
