"""Joining what attention to separate sets of keys gave, and sinks as one more such set.

With lse the log-sum-exp of a query's scores over a set of keys and out its attention to them, two sets together have
lse = log(exp lse_a + exp lse_b) and out = exp(lse_a − lse) · out_a + exp(lse_b − lse) · out_b. A query that sees
nothing of a set has out = 0 and lse = −inf there; of both, also in the result.

Shapes: out (B, n, H, e), lse (B, H, n) in fp32 (fp64 for fp64).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import precise


def per_value(lse: Tensor) -> Tensor:
    """(B, H, n) → (B, n, H, 1), to scale outputs by."""
    return lse.transpose(1, 2)[..., None]


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """out (B, n, H, e) and lse (B, H, n) of both, in lse's precision."""
    out, lse = out_a.to(lse_a.dtype, copy=True), lse_a.clone()
    merge_(out, lse, out_b, lse_b)
    return out, lse


def merge_(out: Tensor, lse: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    """Joins b into `out` (B, n, H, e) and `lse` (B, H, n), which may be views; `out` should have lse's precision."""
    # b's part of the sum: 1 / (1 + exp(lse − lse_b)). Where both are −inf nothing has a part: the difference is no
    # number there.
    share = torch.sigmoid(lse_b - lse).nan_to_num_(nan=0.0)
    lse.copy_(torch.logaddexp(lse, lse_b))
    out.lerp_(out_b.to(out.dtype), per_value(share).to(out.dtype))


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse with sinks (H,): keys that every query sees, with these scores and the value 0."""
    whole = torch.logaddexp(lse, sinks.to(lse.dtype)[None, :, None])
    return (out * per_value((lse - whole).exp_())).to(out.dtype), whole


def row_sums(dout: Tensor, out: Tensor) -> Tensor:
    """Δ (B, H, n): sums of dout · out over each head's values, in the precision of lse."""
    dtype = precise(out.dtype)
    return (dout.to(dtype) * out.to(dtype)).sum(dim=-1).transpose(1, 2)


def sinks_grad(dout: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """(H,) gradient of the sinks, from the out and lse that include them."""
    # A sink's probability times (0 − Δ): it has no value.
    probs = (sinks.to(lse.dtype)[None, :, None] - lse).exp_()
    return -(probs * row_sums(dout, out)).sum((0, 2)).to(sinks.dtype)
