"""What a step adds up over microbatches, shards and ranks besides gradients: losses, and the squares of the norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...configs.schema import Config
from ...parallel.kernels.exact_sums import SCALAR_GRIDS, from_words, words_of_squares, words_of_sum
from .adamw_kernels import SquareSum, square_sum


@dataclass(frozen=True)
class StepSums:
    """How they are added up; whatever it is, parts of sums are fp64 (words,), which any collective may add.

    Args:
        words: of a sum; more than one: the order of adding changes no bit (`parallel.kernels.exact_sums`).
        zero: of the precision of losses and norms.
        squares_of: adds up the squares of a gradient.
    """

    words: int
    zero: Tensor
    squares_of: SquareSum

    @staticmethod
    def of(cfg: Config, zero: Tensor) -> StepSums:
        """As the job wants them."""
        words = len(SCALAR_GRIDS) if cfg.train.deterministic == "elastic" else 1
        return StepSums(words, zero, square_sum(cfg.optim, zero.device))

    def squares(self, gradients: Sequence[Tensor]) -> Tensor:
        """Of the squares of all elements."""
        if self.words > 1:
            return sum(map(words_of_squares, gradients), self._none)
        return (self.zero + self.squares_of(gradients)).double().view(1)

    def losses(self, losses: Sequence[Tensor]) -> Tensor:
        """Of losses of microbatches."""
        if self.words > 1:
            return words_of_sum(torch.stack(list(losses))) if losses else self._none
        return (torch.stack(list(losses)).sum() if losses else self.zero).double().view(1)

    @property
    def _none(self) -> Tensor:
        return torch.zeros(self.words, dtype=torch.float64, device=self.zero.device)

    def whole(self, parts: Tensor) -> Tensor:
        """The sum (), in fp64, from its parts over all ranks."""
        return from_words(parts)

    def told(self, numbers: Tensor) -> Tensor:
        """The numbers behind the parts of two sums over all ranks, with the sums in the place of these."""
        if self.words == 1:
            return numbers
        one, two = (self.whole(part).view(1) for part in numbers[: 2 * self.words].split(self.words))
        return torch.cat((one, two, numbers[2 * self.words :]))
