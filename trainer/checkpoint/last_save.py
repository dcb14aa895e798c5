"""How the step loop meets the save that is being written beside it."""

from __future__ import annotations

import torch

from ...parallel.comm.collectives import all_reduce
from ...parallel.comm.mesh import Axis
from .checkpointer import Checkpointer, CheckpointError


def still_written(checkpointer: Checkpointer, world: Axis, device: torch.device) -> bool:
    """Whether any rank still writes the last save. All ranks ask at the same step, and hear the same.

    Args:
        checkpointer: of this rank.
        world: axis over all ranks.
        device: for the answer.
    """
    busy = checkpointer.busy
    if busy is None:
        return False
    ranks = torch.tensor([float(busy)], dtype=torch.float64, device=device)
    return bool(all_reduce(ranks, world).wait().item())


def wait_for_last(checkpointer: Checkpointer, step: int) -> None:
    """Returns when the last save is there.

    Raises:
        CheckpointError: it is not, with what that means for a run that has come to `step`.
    """
    try:
        checkpointer.wait()
    except CheckpointError as error:
        done = f"training came to step {step}, and its last save failed"
        raise CheckpointError(f"{done}: {error}; checkpoint.resume=latest goes on from the one before") from error
