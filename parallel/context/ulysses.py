"""Context parallelism by exchanging heads (DeepSpeed-Ulysses, arXiv 2309.14509): all heads of some tokens become some
heads of all tokens, attention runs as on one device, and its output goes the other way.

    q, k, v (B, n, H, ·) ─ all-to-all ▶ (B, P · n, H / P, ·) ─ attention ▶ out (B, P · n, H / P, e) ─ all-to-all ▶

Any mask works. With b sequences of s tokens on each of P ranks, a rank sends
(P − 1) / P · b · s · (H (d + e) + K' (d + e)) elements forward, and as many backward; K' = lcm(K, P) is the number of
key-value heads: where P does not divide theirs they are repeated, and the gradients of the copies added.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...configs.errors import Problem, UserError
from ...configs.schema_parallel import ContextConfig
from ..comm.collectives import all_to_all
from ..comm.mesh import Axis, Mesh
from ..kernels.attention import attention
from ..kernels.interfaces import AttentionCall, LocalAttention
from ..kernels.mask import Mask
from ..kernels.precision import precise
from .gathered_tokens import GatheredTokens

_MOST_PIECES = 16
PIECE_BYTES = 1 << 22
"""Of an exchange: more pieces save little memory, and smaller ones take longer to launch than to travel."""


class Ulysses:
    """A `Core`: every rank attends with its heads to whole sequences.

    Args:
        axis: the ranks that share the sequences; their number divides that of the query heads.
        local: attention of one device.
        piece_bytes: tensors at least twice as large are exchanged in pieces.
    """

    def __init__(self, axis: Axis, local: LocalAttention, piece_bytes: int = PIECE_BYTES) -> None:
        self._axis, self._local, self._piece_bytes = axis, local, piece_bytes

    @staticmethod
    def of(context: ContextConfig, mesh: Mesh, local: LocalAttention) -> Ulysses:
        """The core of a job; arguments as of `make_core`."""
        return Ulysses(mesh.axis("cp"), local)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        """See `Core`. Saved for backward: q, k, v, out and lse of all tokens and this rank's heads.

        Raises:
            UserError: see `check_heads`.
        """
        layout = call.layout
        tokens = layout.once(GatheredTokens, layout.ranks)
        exchange = HeadExchange(self._axis, tokens, self._piece_bytes)
        q, k, v, sinks = exchange.split_heads(q, k, v, call.sinks)
        mask = layout.once(Mask.of, tokens.rows, call.window)
        out = attention(self._local, q, k, v, mask, call.scale, sinks)
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
class HeadExchange:
    """Heads for tokens and back, with autograd.

    Every tensor has its own exchange, and that is done in pieces: while one travels the last one is put in place and
    the next one packed, and beside a tensor and what becomes of it no more than three pieces exist.

    Args:
        axis: the ranks.
        tokens: theirs.
        piece_bytes: the least that a piece of an exchange has on each side.
    """

    axis: Axis
    tokens: GatheredTokens
    piece_bytes: int

    def split_heads(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v (B, n, heads, ·) and sinks (H,) → this rank's heads, of the tokens (B, P · n, ·, ·) of all ranks.

        Raises:
            UserError: see `check_heads`.
        """
        ranks, kv_heads = self.axis.size, k.shape[2]
        check_heads(q.shape[2], ranks)
        copies = math.lcm(kv_heads, ranks) // kv_heads
        if sinks is not None:
            sinks = sinks.chunk(ranks)[self.axis.rank]
        q, k, v = (_ToHeads.apply(x, self, repeat) for x, repeat in ((q, 1), (k, copies), (v, copies)))
        return q, k, v, sinks

    def join_heads(self, out: Tensor) -> Tensor:
        """(B, P · n, H / P, e) → (B, n, H, e)."""
        return _ToTokens.apply(out, self)

    def to_heads(self, x: Tensor, copies: int = 1) -> Tensor:
        """(B, n, heads, w) → (B, P · n, heads · copies / P, w), the copies of a head side by side; no autograd."""
        ranks = self.axis.size
        batch, count, heads, width = x.shape
        whole = x.new_empty(batch, ranks * count, heads * copies // ranks, width)

        def pack(part: slice) -> Tensor:
            repeated = x[:, part] if copies == 1 else x[:, part].repeat_interleave(copies, dim=2)
            return repeated.unflatten(2, (ranks, -1)).movedim(2, 0)

        self._travel(self._pieces(whole, count), pack, lambda part, arrived: self.tokens.put(whole, part, arrived))
        return whole

    def to_tokens(self, whole: Tensor, copies: int = 1) -> Tensor:
        """The other way; copies are added up, in fp32 at least."""
        ranks = self.axis.size
        batch, tokens, heads, width = whole.shape
        count = tokens // ranks
        x = whole.new_empty(batch, count, heads * ranks // copies, width)

        def put(part: slice, arrived: Tensor) -> None:
            joined = arrived.movedim(0, 2)  # (B, m, P, heads, w)
            if copies > 1:
                joined = joined.flatten(2, 3).unflatten(2, (-1, copies)).sum(dim=3, dtype=precise(x.dtype))
            x[:, part].view(joined.shape).copy_(joined)

        self._travel(self._pieces(whole, count), lambda part: self.tokens.get(whole, part), put)
        return x

    def _travel(
        self, parts: list[slice], pack: Callable[[slice], Tensor], put: Callable[[slice, Tensor], None]
    ) -> None:
        """Exchanges what `pack` makes, (P, B, m, heads, w), and gives what arrives in that shape to `put`."""
        flight = all_to_all(pack(parts[0]), self.axis)
        for part, after in pairwise(parts):
            leaving = pack(after).contiguous()
            arrived = flight.wait()
            flight = all_to_all(leaving, self.axis)
            put(part, arrived)
            del leaving, arrived
        put(parts[-1], flight.wait())

    def _pieces(self, whole: Tensor, tokens: int) -> list[slice]:
        """A rank's tokens in pieces."""
        count = max(1, min(_MOST_PIECES, whole.nbytes // self.piece_bytes, tokens))
        return [slice(tokens * piece // count, tokens * (piece + 1) // count) for piece in range(count)]


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: HeadExchange, copies: int) -> Tensor:
        ctx.exchange, ctx.copies = exchange, copies
        return exchange.to_heads(x, copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.exchange.to_tokens(grad, ctx.copies), None, None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, exchange: HeadExchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.to_tokens(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.exchange.to_heads(grad), None
