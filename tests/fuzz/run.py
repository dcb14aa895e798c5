"""Runs one case and says what went wrong, if anything did."""

from __future__ import annotations

import math
import shutil
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from pentad.trainer.checkpoint.hugging_face import export_hf
from tests.fuzz.cases import Case, Layout, as_yaml
from tests.fuzz.compare import Difference, beyond, differences, read_run, undetermined, unexplained
from tests.fuzz.jobs import RunFailed, run_job
from tests.fuzz.ranks import UNDISTURBED, Disturbance

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


class _Differs(Exception):
    """A layout trains something else than one process."""


def run_case(case: Case, folder: Path) -> Outcome:
    """Trains the case on one process and under both layouts, and compares; the runs' files go to `folder`."""
    started, rounding, reason = time.monotonic(), 0.0, None
    shutil.rmtree(folder, ignore_errors=True)
    try:
        rounding = _Runs(case, folder).check()
    except (RunFailed, _Differs) as error:
        reason = str(error)
    except Exception as error:
        reason = "".join(traceback.format_exception(error))
    return Outcome(reason, time.monotonic() - started, rounding)


class _Runs:
    """The runs of one case."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        self.cfg = case.alone.config
        self.free = undetermined(self.cfg.model)

    def check(self) -> float:
        """The largest difference that rounding explains.

        Raises:
            RunFailed: a run did not go to its end.
            _Differs: a difference that rounding does not explain.
        """
        start = self._start()
        alone = self._run(self.case.alone, "alone", start)
        whole = read_run(alone, 0, self.cfg.train.steps)
        if not all(math.isfinite(value) for value in whole.curve.values()):
            raise _Differs(f"one process diverges: {whole.curve}")
        found = self._stopped(alone, start) if self.case.stopped_rank is not None else self._overtaken(alone, start)
        if not any(map(beyond, found.values())):
            return 0.0
        noise = [self._nudged(n, alone, start) for n in range(NUDGES)]
        for name, differs in found.items():
            left = unexplained(differs, noise)
            if left:
                alike = _listed(beyond(noise[0])) or "nothing beyond the tolerance"
                raise _Differs(f"the {name} run differs: {_listed(left)}; rounding alone moves {alike}")
        return max(d.size for differs in found.values() for d in beyond(differs))

    def _overtaken(self, alone: Path, start: list[str]) -> dict[str, list[Difference]]:
        """The first layout trains to the end; the second one from a checkpoint on, in a folder of its own."""
        resume, steps = self.case.resume, self.cfg.train.steps
        first = self._run(self.case.first, "first", start)
        checkpoint = first / "checkpoints" / f"step-{resume:08d}"
        second = self._run(self.case.second, "second", [f"checkpoint.resume={checkpoint}"])
        return {"first": self._compared(first, alone, 0, steps), "second": self._compared(second, alone, resume, steps)}

    def _stopped(self, alone: Path, start: list[str]) -> dict[str, list[Difference]]:
        """A signal stops the first layout; the second one goes on in its folder, whose files then tell all steps."""
        resume, steps, rank = self.case.resume, self.cfg.train.steps, self.case.stopped_rank
        assert rank is not None
        first = self._run(self.case.first, "first", start, Disturbance(stop=(rank, resume)))
        found = {"first": self._compared(first, alone, 0, resume)}
        second = self._run(self.case.second, "second", ["checkpoint.resume=latest", *start], runs="first")
        return found | {"second": self._compared(second, alone, 0, steps)}

    def _nudged(self, seed: int, alone: Path, start: list[str]) -> list[Difference]:
        nudged = self._run(self.case.alone, "nudged", start, Disturbance(nudge=seed), runs=f"nudged-{seed}")
        return self._compared(nudged, alone, 0, self.cfg.train.steps)

    def _compared(self, run: Path, alone: Path, since: int, until: int) -> list[Difference]:
        mine, expected = read_run(run, since, until), read_run(alone, since, until)
        return differences(mine, expected, self.cfg.train.dtype, self.free)

    def _run(
        self, layout: Layout, name: str, more: list[str], meets: Disturbance = UNDISTURBED, *, runs: str | None = None
    ) -> Path:
        return run_job(
            self.case.yaml(), layout.world, self.folder / (runs or name), name, [*layout.overrides(), *more], meets
        )

    def _start(self) -> list[str]:
        """Makes the weights that the case starts from; the overrides that name them."""
        case = self.case
        if case.origin is None:
            return []
        made = run_job(as_yaml(case.origin), 1, self.folder / "origin", "origin", []) / "checkpoints" / "step-00000001"
        if case.start == "hf":
            export_hf(made, self.folder / "hf", notice=lambda _: None)
            made = self.folder / "hf"
        return [f"checkpoint.init={made}", *(["checkpoint.upcycle=true"] if case.start == "upcycled" else [])]


def _listed(found: list[Difference]) -> str:
    more = f" and {len(found) - 6} more" if len(found) > 6 else ""
    return ", ".join(f"{d.what} by {d.size:.1e} (allowed {d.allowed:.0e})" for d in found[:6]) + more
