"""Context parallelism in two directions (USP, arXiv 2405.07719): neighbouring ranks exchange heads, and lines of ranks
with the same heads use another method.

    rank = outer · U + inner            inner 0      inner 1
                            outer 0       0            1         ◀─ heads for tokens ─▶
                            outer 1       2            3
                                        the other method, each with 1 / U of the heads of U ranks' tokens
"""

from __future__ import annotations

from torch import Tensor

from ...configs.schema_parallel import ContextConfig
from ..comm.mesh import Axis, Mesh
from ..kernels.interfaces import AttentionCall, Core, LocalAttention
from ..kernels.mask import TokenIndex, TokenLayout
from .gathered_tokens import GatheredTokens
from .ring import Ring
from .ulysses import PIECE_BYTES, HeadExchange


class Usp:
    """A `Core`: heads are exchanged over `inner`, `outer` does the rest.

    Args:
        inner: U neighbouring ranks of the context axis.
        outer: a method over the ranks with the same place on their inner axes.
        piece_bytes: as of `Ulysses`.
    """

    def __init__(self, inner: Axis, outer: Core, piece_bytes: int = PIECE_BYTES) -> None:
        self._inner, self._outer, self._piece_bytes = inner, outer, piece_bytes

    @staticmethod
    def of(context: ContextConfig, mesh: Mesh, local: LocalAttention) -> Usp:
        """The core of a job; arguments as of `make_core`."""
        return Usp(mesh.axis("cp_inner"), Ring(mesh.axis("cp_outer"), mesh.axis("cp_outer_back"), local))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        """See `Core`.

        Raises:
            UserError: see `ulysses.check_heads`, for the ranks of `inner`.
        """
        size, layout = self._inner.size, call.layout
        lines = layout.once(_lines, layout.ranks, size)
        line = layout.rank // size
        exchange = HeadExchange(self._inner, lines[line], self._piece_bytes)
        q, k, v, sinks = exchange.split_heads(q, k, v, call.sinks)
        theirs = AttentionCall(layout.once(_as_ranks, lines, line), call.window, call.scale, sinks)
        out = self._outer(q, k, v, theirs)
        return exchange.join_heads(out)


def _lines(ranks: tuple[TokenIndex, ...], size: int) -> tuple[GatheredTokens, ...]:
    """The tokens of each inner axis."""
    return tuple(GatheredTokens(ranks[first : first + size]) for first in range(0, len(ranks), size))


def _as_ranks(lines: tuple[GatheredTokens, ...], line: int) -> TokenLayout:
    return TokenLayout(tuple(tokens.rows for tokens in lines), line)
