"""The cross-entropy of logits that may be cut over the vocabulary: two passes over them, in fp32.

The first finds each row's largest logit, the sum of exponentials relative to it, and the label's logit; the ranks of
the vocabulary agree on these. The second writes the gradient over the logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .jit import compiled
from .operators import operator

_BLOCK = 2048


@compiled
def _statistics_kernel(logits, labels, found, rows, width, start, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    peak = float("-inf")
    total = 0.0
    for first in range(0, width, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(logits + row * width + at, mask=at < width, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(x, 0))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(x - higher), 0)
        peak = higher
    target = tl.load(labels + row) - start
    mine = (target >= 0) & (target < width)
    picked = tl.load(logits + row * width + target, mask=mine, other=0.0).to(tl.float32)
    tl.store(found + row, peak)
    tl.store(found + rows + row, total)
    tl.store(found + 2 * rows + row, picked)


@compiled
def _gradient_kernel(logits, labels, peak, total, factor, width, start, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < width
    weight = tl.load(factor + row)
    x = tl.load(logits + row * width + at, mask=there, other=float("-inf")).to(tl.float32)
    share = tl.exp(x - tl.load(peak + row)) / tl.load(total + row)
    grad = (share - tl.where(at == tl.load(labels + row) - start, 1.0, 0.0)) * weight
    tl.store(logits + row * width + at, grad.to(logits.dtype.element_ty), mask=there)


@operator(
    "row_statistics(Tensor logits, Tensor labels, int start) -> Tensor",
    lambda logits, labels, start: logits.new_empty((3, len(logits)), dtype=torch.float32),
)
def row_statistics(logits: Tensor, labels: Tensor, start: int) -> Tensor:
    """(3, n) fp32 of logits (n, V): each row's largest, the sum of exp(logit − largest), and the label's logit.

    Args:
        logits: (n, V), contiguous, of the rows [start, start + V) of the vocabulary.
        labels: (n,) in the whole vocabulary; of another part: its logit is 0 here.
        start: of this part.
    """
    found = logits.new_empty((3, len(logits)), dtype=torch.float32)
    if len(logits):
        _statistics_kernel[(len(logits),)](logits, labels, found, *logits.shape, start, BLOCK=_BLOCK)
    return found


@operator(
    "cross_entropy_gradient(Tensor(a!) logits, Tensor labels, Tensor peak, Tensor total, Tensor factor, int start)"
    " -> ()",
    lambda *_: None,
)
def write_gradient(logits: Tensor, labels: Tensor, peak: Tensor, total: Tensor, factor: Tensor, start: int) -> None:
    """logits (n, V) become (softmax − one-hot(label)) · factor.

    Args:
        logits, labels, start: as of `row_statistics`.
        peak, total: (n,) over the whole vocabulary.
        factor: (n,) of each row's loss.
    """
    if len(logits):
        width = logits.shape[1]
        grid = (len(logits), triton.cdiv(width, _BLOCK))
        _gradient_kernel[grid](logits, labels, peak, total, factor, width, start, BLOCK=_BLOCK)
