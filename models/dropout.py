"""Dropout whose draws are keyed, so that they depend on the sample and never on which device computes it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """The dropout of one micro-batch.

    Args:
        rate: probability of a zero.
        seed, step: of the run.
        samples: global sample index of each sequence, B of them.
        length: tokens per sequence, T.
        start, stop: the rows of the (N, h) residual stream that this device holds; N = B · T.
    """

    rate: float
    seed: int
    step: int
    samples: tuple[int, ...]
    length: int
    start: int
    stop: int

    def drop(self, x: Tensor, branch: int) -> Tensor:
        """x (stop − start, h) with elements zeroed and the rest scaled by 1 / (1 − rate)."""
        masks = []
        for i, sample in enumerate(self.samples):
            first, last = max(self.start, i * self.length), min(self.stop, (i + 1) * self.length)
            if first < last:
                key = [self.seed, self.step, sample, branch + 1]
                state = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
                draws = torch.rand(self.length, x.shape[-1], generator=torch.Generator().manual_seed(state))
                masks.append(draws[first - i * self.length : last - i * self.length] >= self.rate)
        return x * (torch.cat(masks).to(x.device, x.dtype) / (1 - self.rate))
