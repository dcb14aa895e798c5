"""The end of a run in which bits have changed by themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...parallel.comm.collectives import all_reduce
from ...parallel.comm.mesh import Mesh
from ..checkpoint.names import checkpoints
from .findings import conclude
from .guard import NumericsGuard


class CorruptedError(RuntimeError):
    """Bits of the state or of a gradient have changed by themselves."""


def corrupted_error(
    guard: NumericsGuard | None,
    mesh: Mesh,
    step: int,
    saved: Path,
    tell: Callable[..., object] | None,
    *,
    saving: bool = False,
) -> CorruptedError:
    """Brings together where bits were found changed in a step; on all ranks.

    Args:
        guard: of this rank, that found some, or another rank's did.
        mesh: of the job.
        step: counted from 1.
        saved: folder of the run's checkpoints.
        tell: is given an event's name and fields; none: another rank says it.
        saving: the step has not begun, the state before it was to be saved.
    """
    assert guard is not None  # nobody else finds any
    found = conclude(step, mesh.gather_objects(guard.findings(step - 1)))
    if tell is not None:
        for event in found.events():
            tell("numerics", **event)
    good = (path for done, path in checkpoints(saved) if done <= found.good)
    return CorruptedError(found.text(next(good, None), saving=saving))


def check_before_save(
    guard: NumericsGuard | None, mesh: Mesh, step: int, saved: Path, tell: Callable[..., object] | None
) -> None:
    """Looks at the state after `step` updates before it is saved; on all ranks. Other arguments as of
    `corrupted_error`.

    Raises:
        CorruptedError: bits of it have changed by themselves.
    """
    if guard is None:
        return
    if all_reduce(guard.check_at_rest().view(1), mesh.axis("world")).wait().item():
        raise corrupted_error(guard, mesh, step + 1, saved, tell, saving=True)
    guard.saved(step)
