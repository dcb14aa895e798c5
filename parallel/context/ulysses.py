"""Context parallelism by exchanging heads (DeepSpeed-Ulysses, arXiv 2309.14509): all heads of some tokens become some
heads of all tokens, attention runs as on one device, and its output goes the other way.

    q, k, v (B, n, H, ·) ─ all-to-all ▶ (B, P · n, H / P, ·) ─ attention ▶ out (B, P · n, H / P, e) ─ all-to-all ▶

Any mask works. With b sequences of s tokens on each of P ranks, a rank sends
(P − 1) / P · b · s · (H (d + e) + K' (d + e)) elements forward, and as many backward; K' = lcm(K, P) is the number of
key-value heads: where P does not divide theirs they are repeated, and the gradients of the copies added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...configs.errors import Problem, UserError
from ..collectives import all_to_all
from ..mesh import Axis
from .local import LocalAttention
from .one_device import attention
from .rows import Mask, Spread
from .united import United


class Ulysses:
    """A `Core`: every rank attends with its heads to whole sequences.

    Args:
        axis: the ranks that share the sequences; their number divides that of the query heads.
        local: attention of one device.
    """

    def __init__(self, axis: Axis, local: LocalAttention) -> None:
        self._axis, self._local = axis, local

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spread: Spread,
        window: int | None,
        scale: float,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """See `Core`. Saved for backward: q, k, v, out and lse of all tokens and this rank's heads.

        Raises:
            UserError: see `check_heads`.
        """
        tokens = spread.once(United, spread.ranks)
        exchange = Exchange(self._axis, tokens)
        q, k, v, sinks = exchange.split_heads(q, k, v, sinks)
        out = attention(self._local, q, k, v, spread.once(Mask.of, tokens.rows, window), scale, sinks)
        return exchange.join_heads(out)


def check_heads(heads: int, ranks: int) -> None:
    """Whether this many ranks can share a tensor-parallel rank's query heads.

    Raises:
        UserError: `ranks` does not divide `heads`.
    """
    if heads % ranks:
        raise UserError(
            Problem(
                "parallel.cp",
                f"{ranks} ranks cannot share {heads} query heads (model.heads / parallel.tp) evenly; set parallel.cp "
                "(for usp parallel.context.inner) to a divisor of it, or parallel.context.method=ring",
            )
        )


@dataclass(frozen=True)
class Exchange:
    """Heads for tokens and back, with autograd.

    Args:
        axis: the ranks.
        tokens: theirs.
    """

    axis: Axis
    tokens: United

    def split_heads(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v (B, n, heads, ·) and sinks (H,) → this rank's heads, of the tokens (B, P · n, ·, ·) of all ranks.

        Raises:
            UserError: see `check_heads`.
        """
        ranks, heads, kv_heads = self.axis.size, q.shape[2], k.shape[2]
        check_heads(heads, ranks)
        copies = math.lcm(kv_heads, ranks) // kv_heads
        if copies > 1:
            k, v = (_Repeat.apply(x, copies) for x in (k, v))
        if sinks is not None:
            sinks = sinks.chunk(ranks)[self.axis.rank]
        q, k, v = _ToHeads.apply(self, q, k, v)
        return q, k, v, sinks

    def join_heads(self, out: Tensor) -> Tensor:
        """(B, P · n, H / P, e) → (B, n, H, e)."""
        return _ToTokens.apply(self, out)[0]

    def to_heads(self, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """(B, n, heads, ·) each → (B, P · n, heads / P, ·), views of one tensor, in one exchange; no autograd."""
        ranks = self.axis.size
        shapes = [(x.shape[2] // ranks, x.shape[3]) for x in xs]
        leaving = torch.cat([x.unflatten(2, (ranks, -1)).flatten(3).movedim(2, 0) for x in xs], dim=-1)
        arrived = self.tokens.ascending(all_to_all(leaving, self.axis).wait())
        parts = arrived.split([heads * width for heads, width in shapes], dim=-1)
        return tuple(part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True))

    def to_tokens(self, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The inverse of `to_heads`; tensors of their own."""
        shapes = [x.shape[2:] for x in xs]
        leaving = self.tokens.by_rank(torch.cat([x.flatten(2) for x in xs], dim=-1))
        arrived = all_to_all(leaving, self.axis).wait().movedim(0, 2)
        parts = arrived.split([shape.numel() for shape in shapes], dim=-1)
        return tuple(part.unflatten(-1, shape).flatten(2, 3) for part, shape in zip(parts, shapes, strict=True))


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return exchange.to_heads(xs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, *ctx.exchange.to_tokens(grads)


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return exchange.to_tokens(xs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, *ctx.exchange.to_heads(grads)


class _Repeat(torch.autograd.Function):
    """(B, n, K, ·) → (B, n, K · copies, ·), the copies of a head side by side; gradients add up in fp32 at least."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, copies: int) -> Tensor:
        ctx.copies = copies
        return x.repeat_interleave(copies, dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad.unflatten(2, (-1, ctx.copies)).sum(dim=3), None
