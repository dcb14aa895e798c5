"""Passes that sleep instead of computing: they take their time and no core, so that many ranks run side by side."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from pentad.parallel.comm.collectives import Handle
from pentad.parallel.gradients import WeightGradients


@dataclass(frozen=True)
class _SleepLater:
    """A deferred weight gradient."""

    seconds: float

    def start(self) -> Handle:
        return Handle(torch.empty(0))

    def finish(self, whole: Tensor) -> None:
        time.sleep(self.seconds)


def sleep_backward(store: WeightGradients, *, grad_s: float, weight_s: float) -> None:
    """Both parts of a backward pass, of which the second waits in the store where the pass is split."""
    time.sleep(grad_s)
    if store.is_open:
        store.put(_SleepLater(weight_s))
    else:
        time.sleep(weight_s)
