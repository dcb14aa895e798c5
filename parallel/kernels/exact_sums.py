"""Sums whose bits depend on no order, as fp64 words.

A number is cut into words, each a multiple of a power of two of its own, the coarsest first:

    x = ···hhhhhhhh│llllllll│rest        h a multiple of 2^g0, l of 2^g1 < 2^g0, the rest dropped

Sums of multiples of 2^g are exact in fp64 as long as they stay below 2^(53 + g), so words add up to the same bits in
whatever order and on however many ranks they are added, by any collective. The idea is that of binned sums (Demmel and
Nguyen, "Parallel Reproducible Summation", 2015), with bins that are known beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

GRADIENT_GRIDS = (-33, -72)
"""Of gradients: elements below 2^18, sums below 2^20; rounded to 2^-72 (2e-22), so that 2^15 of them may be added."""
SCALAR_GRIDS = (8, -10, -28, -46, -64, -82, -100, -118)
"""Of losses and squares: elements below 2^59, rounded to 2^-118 (3e-36), so that 2^36 of them may be added."""
_AT_ONCE = 1 << 16
"""Elements that are cut at once: the memory that it takes stays in a cache."""


def _cut(x: Tensor, grids: Sequence[int]) -> list[Tensor]:
    """The words of each element."""
    found, rest = list[Tensor](), x.double()
    for grid in grids:
        # Beside so large a number there is no room for bits below the grid: adding it rounds them away.
        large = 1.5 * 2.0 ** (52 + grid)
        word = (rest + large).sub_(large)
        rest = rest - word
        found.append(word)
    return found


def add_words(words: Tensor, x: Tensor) -> None:
    """words (n, 2) += the words of the n elements of a gradient x."""
    for sums, part in zip(words.split(_AT_ONCE), x.reshape(-1).split(_AT_ONCE), strict=True):
        for place, word in enumerate(_cut(part, GRADIENT_GRIDS)):
            sums[:, place] += word


def from_words(words: Tensor) -> Tensor:
    """(n,) fp64: the numbers whose words are (n, w)."""
    total = words[..., -1]
    for place in reversed(range(words.shape[-1] - 1)):
        total = total + words[..., place]
    return total


def words_of_sum(x: Tensor) -> Tensor:
    """(8,) fp64: the words of the sum of all elements; one that is not finite makes the sum NaN or infinite."""
    parts = x.reshape(-1).split(_AT_ONCE)
    return sum((torch.stack([word.sum() for word in _cut(part, SCALAR_GRIDS)]) for part in parts), _none(x))


def words_of_squares(x: Tensor) -> Tensor:
    """(8,) fp64: the words of the sum of squares, each rounded to fp64 before."""
    parts = x.reshape(-1).split(_AT_ONCE)
    return sum((words_of_sum(part.double().square()) for part in parts), _none(x))


def _none(x: Tensor) -> Tensor:
    return torch.zeros(len(SCALAR_GRIDS), dtype=torch.float64, device=x.device)
