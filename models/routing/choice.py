"""Which experts a token takes, from its scores. Nothing here has a gradient.

Shapes: n tokens of this device, N of the microbatch, C choices (experts and null experts), K experts per token.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from ...configs.schema import MoeConfig

_SINKHORN_TOLERANCE = 1e-4
_SINKHORN_ROUNDS = 100


def choices_of(moe: MoeConfig) -> int:
    """Experts and null experts of a layer."""
    return moe.experts + moe.router.null_experts


def is_plain(moe: MoeConfig) -> bool:
    """Whether a token simply takes the experts with its best scores."""
    router = moe.router
    return router.name == "top_k" and router.groups == 1 and not router.selection_bias


def capacity(moe: MoeConfig, tokens: int) -> int:
    """Rows that an expert takes of so many tokens: the even share times the capacity factor (1 without one)."""
    factor = 1 if moe.capacity_factor is None else Fraction(str(moe.capacity_factor))
    return min(math.ceil(factor * tokens * moe.top_k / moe.experts), tokens)


def top_k(logits: Tensor, scores: Tensor, moe: MoeConfig, bias: Tensor | None) -> Tensor:
    """(n, K) best choices by score plus `bias` (C,); with groups, of the best groups only.

    A group's score is the sum of its best members' (DeepSeek-V3, arXiv 2412.19437, section 2.1.2). Null experts belong
    to no group.

    Args:
        logits, scores: (n, C).
    """
    router = moe.router
    if bias is None and router.groups == 1:
        return logits.topk(moe.top_k, -1).indices  # the order of the scores, in which close ones may have become equal
    by = scores if bias is None else scores + bias.to(scores.dtype)
    if router.groups > 1:
        members = by[:, : moe.experts].unflatten(-1, (router.groups, -1))
        best = members.topk(min(router.group_members, members.shape[-1]), -1).values.sum(-1)
        kept = best.topk(router.groups_kept, -1).indices
        outside = torch.ones_like(best, dtype=torch.bool).scatter_(-1, kept, False)
        members = members.masked_fill(outside.unsqueeze(-1), -math.inf).flatten(1)
        by = torch.cat((members, by[:, moe.experts :]), -1)
    return by.topk(moe.top_k, -1).indices


def coarse(x: Tensor) -> Tensor:
    """Integers in the order of x ≥ 0, which keep half of its mantissa, rounded.

    Tokens with the same text before them have the same scores but for rounding, which depends on how they are computed;
    such tokens shall count as equal everywhere.
    """
    double = x.dtype == torch.float64
    bits, dropped = (x.contiguous().view(torch.int64), 26) if double else (x.float().contiguous().view(torch.int32), 12)
    return (bits + (1 << (dropped - 1))) >> dropped


def expert_choice(scores: Tensor, moe: MoeConfig) -> Tensor:
    """(N, E) whether the expert takes the token: each its `capacity` best ones (Zhou et al., arXiv 2202.09368).

    Of equal ones (`coarse`) it takes the first.
    """
    order = torch.argsort(coarse(scores), dim=0, descending=True, stable=True)
    best = order[: capacity(moe, scores.shape[0])]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(0, best, True)


def as_columns(taken: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Ids (n, width) of the experts that take each token, in ascending order, and which of them count.

    Args:
        taken: (n, E) bool, at most `width` true in a row.
    """
    order = torch.argsort(taken.to(torch.uint8), dim=-1, descending=True, stable=True)[:, :width]
    return order, taken.gather(-1, order)


def sinkhorn_prices(logits: Tensor) -> Tensor:
    """(C,) what to add to every token's logits (N, C), so that the choices share the tokens evenly.

    The fixed point of Sinkhorn and Knopp's alternating normalisation of exp(logits) to rows of 1/N and columns of 1/C
    (S-BASE: Clark et al., arXiv 2202.01169, section 2.2), in logarithms; the row factors change no token's order.
    """
    prices = logits.new_zeros(logits.shape[1])
    for _ in range(_SINKHORN_ROUNDS):
        rows = torch.logsumexp(logits + prices, 1, keepdim=True) + math.log(logits.shape[0])
        moved = -torch.logsumexp(logits - rows, 0) - math.log(logits.shape[1])
        change = (moved - prices).abs().max()
        prices = moved
        if float(change) < _SINKHORN_TOLERANCE:
            break
    return prices


def within_capacity(experts: Tensor, weights: Tensor | None, limit: int, count: int) -> Tensor:
    """(N, K) whether an expert has room for the token.

    Args:
        experts: (N, K) ids; those outside 0 … count − 1 never have room.
        weights: (N, K); the largest are kept, of equal ones (`coarse`) the first; none: the first tokens are kept.
        limit: tokens that an expert keeps.
        count: of experts.
    """
    flat = experts.reshape(-1)
    flat = torch.where(flat < 0, count, flat)
    order = torch.arange(len(flat), device=flat.device)
    if weights is not None:
        order = torch.argsort(coarse(weights).reshape(-1), descending=True, stable=True)
    order = order[torch.argsort(flat[order], stable=True)]  # expert by expert, the first one's best first
    of_expert = torch.zeros(count + 1, dtype=torch.long, device=flat.device)
    of_expert.scatter_add_(0, flat.clamp(max=count), torch.ones_like(flat))
    starts = of_expert.cumsum(0) - of_expert
    ordered = flat[order].clamp(max=count)
    place = torch.arange(len(flat), device=flat.device) - starts[ordered]
    room = torch.empty(len(flat), dtype=torch.bool, device=flat.device)
    room[order] = (place < limit) & (ordered < count)
    return room.view_as(experts)
