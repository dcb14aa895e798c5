"""Steps that are skipped because a loss or gradient is not finite: where it began, and when there are too many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...configs.schema import Config
from ..data.dataset import Microbatch
from ..metrics.formats import numbers
from ..metrics.metric import Alert, Metric
from ..step import Stepper
from .non_finite import NonFinite, find_non_finite

NON_FINITE = Metric(
    "non_finite_alert",
    "a message, and an event, at the first of several skipped steps: where the number that is not finite began",
    in_file=False,
    tracker="optim/non_finite",
    line=lambda _, alert: alert.text,
)


class DivergedError(RuntimeError):
    """Too many steps in a row had no finite gradient."""


class BadSteps:
    """Counts the bad steps of one rank, which all ranks have alike.

    Args:
        cfg: the job.
        stepper: runs its steps.
        hosts: where each rank is, as far as that is known.
    """

    def __init__(self, cfg: Config, stepper: Stepper, hosts: Mapping[int, str]) -> None:
        self._cfg, self._stepper, self._hosts = cfg, stepper, hosts
        self.row = 0
        """Of bad steps up to now."""
        self._began = ""

    def good(self) -> None:
        """A step was good."""
        self.row = 0

    def bad(self, step: int, batches: Sequence[Microbatch], valid: int) -> Alert | None:
        """A step was bad; all ranks call this. The first of a row is run again, to be looked at.

        Args:
            step: 0-based.
            batches, valid: of the step, as of `Stepper.run`.
        """
        self.row += 1
        if self.row > 1:
            return None
        found = find_non_finite(self._stepper, step, batches, valid)
        text = _NOTHING if found is None else _words(found, self._hosts)
        self._began = f"step {step + 1}: {text}"
        fields = {"step": step + 1, **_fields(found, self._hosts)}
        return Alert("not finite", f"not finite: {text}", "non_finite", fields)

    def check(self) -> None:
        """After a bad step was reported.

        Raises:
            DivergedError: there are too many in a row.
        """
        if self.row >= self._cfg.faults.max_bad_steps:
            raise DivergedError(
                f"{self.row} steps in a row had a NaN or infinite gradient (faults.max_bad_steps); it began in "
                f"{self._began}; lower optim.lr={self._cfg.optim.lr:g} or resume from an earlier checkpoint"
            )


_NOTHING = "all numbers are finite when the step is run again; if this repeats, the sum of their squares overflows"


def _words(found: NonFinite, hosts: Mapping[int, str]) -> str:
    host = f" on {hosts[found.rank]}" if found.rank in hosts else ""
    where = f"rank {found.rank}{host}, stage {found.stage}"
    if found.microbatch >= 0:
        where += f", microbatch {found.microbatch} (samples {numbers(found.samples)})"
    what = f"{found.value} first in the {found.tensor} of {found.module}" if found.module else found.value
    if found.during == "parameters":
        what = f"{found.value} in the parameter {found.module}.{found.tensor}"
    else:
        what += _DURING[found.during]
    again = "" if found.repeats else "; run again, the step is finite: a fault of the hardware, or of a kernel"
    return f"{what}, {where}{again}"


_DURING = {
    "forward": ", forward pass",
    "recompute": ", made again in the backward pass",
    "backward": ", backward pass",
    "gradient": ", summed over the ranks",
}


def _fields(found: NonFinite | None, hosts: Mapping[int, str]) -> dict[str, Any]:
    if found is None:
        return {}
    return {
        "rank": found.rank,
        "host": hosts.get(found.rank),
        "stage": found.stage,
        "layer": found.layer,
        "module": found.module,
        "tensor": found.tensor,
        "value": found.value,
        "during": found.during,
        "microbatch": found.microbatch if found.microbatch >= 0 else None,
        "samples": list(found.samples),
        "repeats": found.repeats,
    }
