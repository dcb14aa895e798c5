"""What a spike is when its step was run again: a fault that passes, a fault of a rank, or the data. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

_ELSEWHERE = 0.01
"""Relative difference in loss or norm above which microbatches are others on other ranks: rounding makes less."""

Cause = Literal["transient", "persistent", "data", "repeats"]


@dataclass(frozen=True)
class RunNumbers:
    """What one run of a step came to, the same on all ranks.

    Args:
        loss, grad_norm: of the global batch.
        held: whether one of them is above its limit, and both are finite.
        shares: what each microbatch of the global batch adds to the loss, in order; empty where that is not known.
    """

    loss: float
    grad_norm: float
    held: bool
    shares: tuple[float, ...] = ()

    @property
    def values(self) -> dict[str, float]:
        """By the names that metrics have."""
        return {"loss": self.loss, "grad_norm": self.grad_norm}


@dataclass(frozen=True)
class SpikeVerdict:
    """A spike whose step was run again.

    Args:
        cause: transient: the second run is none; persistent: the same microbatches are others on other ranks; data:
            they are the same there; repeats: there are no other ranks to try.
        found: by quantity, its value, what was expected, and the limit.
        again: the numbers of the second run.
        same_bits: whether they have the bits of the first.
        dp_rank: whose microbatches have higher losses than elsewhere; none: unknown.
        did: what became of the step, for people.
    """

    cause: Cause
    found: Mapping[str, tuple[float, float, float]]
    again: Mapping[str, float]
    same_bits: bool
    dp_rank: int | None = None
    did: str = field(default="")

    @property
    def text(self) -> str:
        """For people, to follow the description of the spike."""
        numbers = f"loss {self.again['loss']:.4g}, gradient norm {self.again['grad_norm']:.4g}"
        why = _WORDS[self.cause].format(numbers=numbers, bits="" if self.same_bits else ", with other bits")
        return f"{why}; {self.did}" if self.did else why

    @property
    def fields(self) -> dict[str, Any]:
        """Of the event."""
        return {"cause": self.cause, "again": dict(self.again), "same_bits": self.same_bits, "did": self.did}


_WORDS = {
    "transient": "run again it is none ({numbers}): a fault of the hardware that has passed, or of a kernel",
    "persistent": "run again it is there{bits}, and the same microbatches are others on other ranks: a fault of a rank",
    "data": "run again it is there{bits}, also on other ranks: the data or the model",
    "repeats": "run again it is there{bits}, and no other rank has these parameters: the data, the model, or a rank",
}


def judge_spike(
    found: Mapping[str, tuple[float, float, float]],
    first: RunNumbers,
    again: RunNumbers,
    moved: RunNumbers | None,
    dp: int,
) -> SpikeVerdict:
    """What follows from the runs of a step.

    Args:
        found: see `SpikeVerdict`.
        first, again: on the same ranks.
        moved: with the microbatches of data parallel rank r + 1 on rank r; none: there is one.
        dp: data parallel ranks.
    """
    same = (first.loss, first.grad_norm, first.shares) == (again.loss, again.grad_norm, again.shares)
    if not again.held:
        return SpikeVerdict("transient", found, again.values, same)
    if moved is None:
        return SpikeVerdict("repeats", found, again.values, same)
    rank = _suspect(again.shares, moved.shares, dp)
    elsewhere = rank is not None or not _close(again.grad_norm, moved.grad_norm) or not _close(again.loss, moved.loss)
    return SpikeVerdict("persistent" if elsewhere else "data", found, again.values, same, rank)


def _suspect(here: Sequence[float], moved: Sequence[float], dp: int) -> int | None:
    """The rank whose microbatches have higher losses than on others; none: all are alike, or nothing is known."""
    if not here or not moved:
        return None
    a = np.reshape(here, (-1, dp))
    b = np.roll(np.reshape(moved, (-1, dp)), 1, axis=1)  # what rank r has made of those of rank r + 1, back in place
    if all(_close(x, y) for x, y in zip(a.flat, b.flat, strict=True)):
        return None
    with np.errstate(invalid="ignore"):
        return int(np.argmax(np.nan_to_num(a - b).sum(axis=0)))


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=_ELSEWHERE)
