"""Assignments of tokens to experts in the order of the experts: a counting sort in three launches.

A block's assignments to an expert stand behind those of the blocks before it, so the order is that of the tokens, and
always the same. Nothing is asked of the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .jit import compiled
from .operators import operator

_CELLS = 8192
"""Assignments times bins that one program holds."""


@compiled
def _count_kernel(ids, counts, total, experts, BLOCK: tl.constexpr, BINS: tl.constexpr):
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    bins = tl.arange(0, BINS)
    expert = tl.load(ids + at, mask=at < total, other=BINS).to(tl.int32)
    expert = tl.where(expert < 0, experts, expert)
    hits = (expert[:, None] == bins[None, :]).to(tl.int32)
    tl.store(counts + block * BINS + bins, tl.sum(hits, 0))


@compiled
def _offset_kernel(counts, sums, blocks, BLOCKS: tl.constexpr, BINS: tl.constexpr):
    bin = tl.program_id(0)
    at = tl.arange(0, BLOCKS)
    mine = tl.load(counts + at * BINS + bin, mask=at < blocks, other=0)
    tl.store(counts + at * BINS + bin, tl.cumsum(mine, 0) - mine, mask=at < blocks)
    tl.store(sums + bin, tl.sum(mine, 0))


@compiled
def _place_kernel(
    ids, counts, sums, order, places, ends, total, experts, BLOCK: tl.constexpr, BINS: tl.constexpr
):  # fmt: skip
    block = tl.program_id(0)
    bins = tl.arange(0, BINS)
    of_bin = tl.load(sums + bins)
    last = tl.cumsum(of_bin, 0)
    if block == 0:
        tl.store(ends + bins, last, mask=bins < experts)
    first = last - of_bin + tl.load(counts + block * BINS + bins)
    at = block * BLOCK + tl.arange(0, BLOCK)
    there = at < total
    expert = tl.load(ids + at, mask=there, other=BINS).to(tl.int32)
    expert = tl.where(expert < 0, experts, expert)
    hits = (expert[:, None] == bins[None, :]).to(tl.int32)
    place = tl.sum((tl.cumsum(hits, 0) - 1 + first[None, :]) * hits, 1).to(tl.int64)
    tl.store(order + place, at.to(tl.int64), mask=there)
    tl.store(places + at, tl.where(expert < experts, place, -1), mask=there)


def _shapes(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    made = ids.new_empty(ids.numel()), ids.new_empty(ids.shape)
    return *made, ids.new_empty(experts, dtype=torch.int32)


@operator("sort_by_expert(Tensor ids, int experts) -> (Tensor, Tensor, Tensor)", _shapes, launches=3)
def triton_sort_by_expert(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `parallel.expert.plan.sort_by_expert`."""
    order, places, ends = _shapes(ids, experts)
    bins, total = max(16, triton.next_power_of_2(experts + 1)), ids.numel()
    block = max(16, _CELLS // bins)
    blocks = triton.cdiv(total, block)
    counts = ids.new_empty((blocks, bins), dtype=torch.int32)
    sums = ids.new_empty(bins, dtype=torch.int32)
    if not total:
        return order, places, ends.zero_()
    given = ids.contiguous()
    _count_kernel[(blocks,)](given, counts, total, experts, BLOCK=block, BINS=bins)
    _offset_kernel[(bins,)](counts, sums, blocks, BLOCKS=triton.next_power_of_2(blocks), BINS=bins)
    _place_kernel[(blocks,)](given, counts, sums, order, places, ends, total, experts, BLOCK=block, BINS=bins)
    return order, places, ends
