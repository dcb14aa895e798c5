"""The state of a checkpoint, in the place of what a rank has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ...parallel.global_tensor import GlobalTensor
from ..checkpoint.checkpointer import Checkpointer
from ..checkpoint.same_run import RunProgress
from ..checkpoint.tiers.tiers import Tiers
from ..step import Stepper


def take_state(
    checkpointer: Checkpointer,
    path: Path,
    tensors: Mapping[str, GlobalTensor],
    stepper: Stepper,
) -> RunProgress:
    """Parameters, moments and the count of updates become those of a checkpoint, on all ranks together.

    Args:
        checkpointer: whose the checkpoint is.
        path: a verified checkpoint of the same run.
        tensors: this rank's pieces.
        stepper: of this rank; no step is under way.

    Returns:
        How far the run was.

    Raises:
        UserError: the checkpoint does not fit the model.
    """
    was = RunProgress.of(checkpointer.state(path), path)
    stepper.replicas.wait_gathers()
    checkpointer.load(path, tensors)
    stepper.optimizer.loaded(tensors)
    stepper.replicas.sync_params()
    if stepper.guard is not None:
        stepper.guard.forget()
    stepper.updates.fill_(float(was.updates))
    return was


def rewound(tiers: Tiers, tensors: Callable[[], Mapping[str, GlobalTensor]], stepper: Stepper) -> Path | None:
    """The newest checkpoint of the run, whose state all ranks have now; None: there is none. Other arguments as of
    `take_state`."""
    with stepper.mesh.recorder.vitals.phase("load"):
        path = tiers.find_resume("latest", tensors)
        if path is not None:
            take_state(tiers.of(path), path, tensors(), stepper)
    return path
