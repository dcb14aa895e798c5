"""What all ranks know of a step once it has committed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..parallel.comm.collectives import Handle
from ..parallel.kernels.upload import Download
from .data.dataset import Microbatch
from .numerics.guard import NumericsGuard
from .numerics.spike_verdict import SpikeVerdict


@dataclass(frozen=True)
class Asked:
    """What a step is asked besides to train, as of `Stepper.run`.

    Args:
        wishes: whether this rank was asked to stop, and whether to leave its mesh.
        watched: numbers of this rank whose largest over all ranks is wanted.
        limits: of the loss and the gradient's norm, the same on all ranks: above one of them nothing is updated.
    """

    wishes: tuple[bool, bool] = (False, False)
    watched: Callable[[], Sequence[float]] = tuple
    limits: tuple[float, float] = (math.inf, math.inf)


NOTHING_ASKED = Asked()


@dataclass(frozen=True)
class StepResult:
    """Scalars on the device."""

    loss: Tensor
    """Mean loss over all valid tokens of the global batch."""
    grad_norm: Tensor
    """Global norm of the gradient, before clipping."""
    skipped: Tensor
    """1 where nothing was updated: the gradient was not finite, bits had changed by themselves, or `held`."""
    held: Tensor
    """1 where nothing was updated for loss or gradient norm is above its limit, though finite."""
    corrupted: Tensor
    """Places, over all ranks and steps, whose bits were found changed by themselves."""
    stop: Tensor
    """Number of ranks that were asked to stop: all ranks see the same number after the same step."""
    leave: Tensor
    """Number of ranks that are to leave their mesh after the step, in the same way."""
    worst: Handle
    """The largest over all ranks of each number that `Stepper.run` was given to watch, fp64; where there are any,
    behind these of own losses, and of the `loss_table`."""
    moe: Tensor | None
    """What the routers counted in the step, over all ranks: (mixture-of-experts layers, `balance` columns)."""
    spike: SpikeVerdict | None = None
    """Where the step was held back, and run again: what it was."""


@dataclass(frozen=True)
class IssuedStep:
    """A step whose numbers may still be on their way from the device."""

    step: int
    result: StepResult
    lr: float
    batches: Sequence[Microbatch]
    """This rank's own."""
    valid: int
    pairs: float
    numbers: Download | None = None
    """What `numbers_of` gives, on its way to the host; none: still to be asked for."""

    @property
    def own_pairs(self) -> float:
        """Attention pairs of this rank's own microbatches."""
        return sum(batch.pairs for batch in self.batches)


def numbers_of(result: StepResult, worst: Tensor) -> Tensor:
    """(6 + n + m,) fp64: loss, norm, skipped, corrupted, wishes to stop and to leave; `worst` (n,); the m counts of
    routers."""
    told = (result.loss, result.grad_norm, result.skipped, result.corrupted, result.stop, result.leave)
    numbers = torch.stack([x.double() for x in told])
    return torch.cat((numbers, worst, *(() if result.moe is None else (result.moe.flatten().double(),))))


@dataclass(frozen=True)
class Outcome:
    """The result, and what the update needs besides."""

    result: StepResult
    factor: Tensor
    """Of the gradients."""


def outcome_of(
    whole: Tensor,
    worst: Handle,
    routed: Tensor | None,
    guard: NumericsGuard | None,
    *,
    clip: float,
    dtype: torch.dtype,
    limits: tuple[float, float],
) -> Outcome:
    """What follows from the sums over all ranks.

    Args:
        whole: (n,) square norm, loss, wishes to stop and to leave, with a guard what it found, then the counts of
            `routed`.
        worst: see `StepResult`.
        routed: shaped as the routers' counts; none: a dense model.
        guard: of this rank.
        clip: of the norm; 0: none.
        dtype: of the results.
        limits: of loss and norm.
    """
    total, rest = whole[:4].to(dtype), whole[4:]
    norm, loss, stop, leave = total[0].sqrt(), total[1], total[2], total[3]
    finite, corrupted = torch.isfinite(total).all(), torch.zeros_like(norm)
    held = (((loss.double() > limits[0]) | (norm.double() > limits[1])) & finite).float()
    skip = (~finite).float().maximum(held)
    if guard is not None:
        corrupted, rest = guard.told(rest[0]), rest[1:]
        skip = skip.maximum((corrupted > 0).float())
    counts = rest.view_as(routed) if routed is not None else None
    factor = (clip / (norm + 1e-6)).clamp(max=1.0) if clip else torch.ones_like(norm)
    factor = torch.where(skip.bool(), torch.ones_like(factor), factor)
    return Outcome(StepResult(loss, norm, skip, held, corrupted, stop, leave, worst, counts), factor)
