"""The end of a run in which bits have changed by themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...parallel.comm.mesh import Mesh
from ..checkpoint.names import checkpoints
from .findings import conclude
from .guard import NumericsGuard


class CorruptedError(RuntimeError):
    """Bits of the state or of a gradient have changed by themselves."""


def corrupted_error(
    guard: NumericsGuard | None, mesh: Mesh, step: int, saved: Path, tell: Callable[..., object] | None
) -> CorruptedError:
    """Brings together where bits were found changed in a step; on all ranks.

    Args:
        guard: of this rank, that found some, or another rank's did.
        mesh: of the job.
        step: counted from 1.
        saved: folder of the run's checkpoints.
        tell: is given an event's name and fields; none: another rank says it.
    """
    assert guard is not None  # nobody else finds any
    found = conclude(step, mesh.gather_objects(guard.findings(step - 1)))
    if tell is not None:
        for event in found.events():
            tell("numerics", **event)
    good = (path for done, path in checkpoints(saved) if done <= found.good)
    return CorruptedError(found.text(next(good, None)))
