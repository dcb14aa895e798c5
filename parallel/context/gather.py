"""Context parallelism by gathering keys and values: each rank gets all of them, and keeps its queries.

    forward     all-gather k ‖ v       one local attention, to keys in ascending order
    backward    all-gather k ‖ v       gradients of all keys and values, summed where these are at home

Any mask works, nothing is merged, and no head number matters. With b sequences of s tokens on each of P ranks, a rank
sends (P − 1) · b · s · K · (d + e) elements three times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..collectives import all_gather, all_to_all
from ..mesh import Axis
from .local import LocalAttention
from .merge import add_sinks, sinks_grad
from .rows import Mask, Spread
from .united import United


class AllGather:
    """A `Core`: the keys and values of all ranks are gathered, again in backward.

    Args:
        axis: the ranks that share the sequences.
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
        """See `Core`. Saved for backward: q, k, v, out and lse of this rank's tokens."""
        return _Gathered.apply(q, k, v, sinks, self._axis, self._local, spread, window, scale)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        axis: Axis,
        local: LocalAttention,
        spread: Spread,
        window: int | None,
        scale: float,
    ) -> Tensor:
        tokens = spread.once(United, spread.ranks)
        mask = spread.once(Mask, spread.mine, tokens.rows, window)
        keys, values = _gather(k, v, axis, tokens)
        out, lse = local.forward(q, keys, values, mask, scale)
        if sinks is not None:
            out, lse = add_sinks(out, lse, sinks)
        ctx.settings = axis, local, tokens, mask, scale
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, sinks, out, lse = ctx.saved_tensors
        axis, local, tokens, mask, scale = ctx.settings
        keys, values = _gather(k, v, axis, tokens)
        dq, dk, dv = local.backward(dout, q, keys, values, out, lse, mask, scale)
        del keys, values
        dk, dv = _summed_at_home(dk, dv, axis, tokens, k.dtype)
        dsinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            dsinks = sinks_grad(dout, out, lse, sinks)
        return dq.to(q.dtype), dk, dv, dsinks, None, None, None, None, None


def _gather(k: Tensor, v: Tensor, axis: Axis, tokens: United) -> tuple[Tensor, Tensor]:
    """k (B, S, K, d) and v (B, S, K, e) of all ranks, in ascending order; views of one tensor."""
    both = torch.cat([k, v], dim=-1)
    found = all_gather(both, axis).wait().unflatten(0, (axis.size, -1))
    keys, values = tokens.ascending(found).split([k.shape[-1], v.shape[-1]], dim=-1)
    return keys, values


def _summed_at_home(dk: Tensor, dv: Tensor, axis: Axis, tokens: United, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The ranks' gradients of all keys and values → the sums of this rank's.

    They travel in the keys' type and are added in the gradients', on this rank: a library's reduce-scatter would either
    send twice the bytes or, from rank to rank, round bf16 sums each time.
    """
    precision, widths = dk.dtype, [dk.shape[-1], dv.shape[-1]]
    both = torch.cat([dk.to(dtype), dv.to(dtype)], dim=-1)
    parts = all_to_all(tokens.by_rank(both), axis).wait()
    dk, dv = parts.sum(dim=0, dtype=precision).to(dtype).split(widths, dim=-1)
    return dk, dv
