"""Dropout and noise whose draws are keyed: they depend on the sample and never on which device computes it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..parallel.kernels.upload import upload


@dataclass(frozen=True)
class Draws:
    """The random numbers of one microbatch.

    Args:
        rate: probability of a zero in dropout.
        seed, step: of the run.
        samples: global sample index of each sequence, B of them.
        length: tokens per sequence, T.
        rows: (n,) which rows of the (B · T, h) residual stream of whole sequences this device holds, sequence by
            sequence; on the host.
    """

    rate: float
    seed: int
    step: int
    samples: tuple[int, ...]
    length: int
    rows: Tensor

    def drop(self, x: Tensor, branch: int) -> Tensor:
        """x (n, h) with elements zeroed and the rest scaled by 1 / (1 − rate)."""
        if not self.rate:
            return x
        dropped = self._uniform(x, branch + 1) < self.rate
        # Not times a tensor of 0 and 1 / (1 − rate): in half precision that would round the factor of all elements.
        return (x / (1 - self.rate)).masked_fill(upload(dropped, x.device), 0)

    def jitter(self, x: Tensor, width: float, layer: int) -> Tensor:
        """x (n, h), each element times a number between 1 − width and 1 + width."""
        noise = self._uniform(x, layer, 1) * (2 * width) + (1 - width)
        return x * upload(noise, x.device).to(x.dtype)

    def _uniform(self, x: Tensor, *key: int) -> Tensor:
        """Numbers from 0 to 1 for x, on the host."""
        parts = []
        counts = torch.bincount(self.rows // self.length, minlength=len(self.samples)).tolist()
        for sample, mine in zip(self.samples, (self.rows % self.length).split(counts), strict=True):
            if len(mine):
                sequence = np.random.SeedSequence([self.seed, self.step, sample, *key])
                state = int(sequence.generate_state(1, np.uint64)[0] >> 1)
                draws = torch.rand(self.length, x.shape[-1], generator=torch.Generator().manual_seed(state))
                parts.append(draws[mine])
        return torch.cat(parts)
