"""What context parallelism asks of one device's attention kernels, and what a model asks of a method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from .mask import Mask, TokenLayout


class LocalAttention(Protocol):
    """Attention of any queries to any keys on one device, without autograd.

    Shapes: q (B, n, H, d), k (B, m, K, d), v (B, m, K, e) with K dividing H, out (B, n, H, e), lse (B, H, n) in fp32
    (fp64 for fp64), natural logarithm. A query that sees no key has out = 0 and lse = −inf.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
        """out and lse."""
        ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv, in the operands' type or in lse's, of these keys' part: `out` and `lse` are those of each query
        over all keys, wherever these are."""
        ...


def to_be_summed(grads: tuple[Tensor, Tensor, Tensor], lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `LocalAttention.backward` gives, in lse's precision, so that those of other keys or queries can be added."""
    dq, dk, dv = (grad.to(lse.dtype) for grad in grads)
    return dq, dk, dv


@dataclass(frozen=True)
class AttentionCall:
    """What a layer tells its core besides queries, keys and values.

    Args:
        layout: which tokens these are, and who has the others.
        window: sliding window, or none.
        scale: multiplier of the scores.
        sinks: (H,) scores that join each softmax of their head and have no value, or none.
    """

    layout: TokenLayout
    window: int | None
    scale: float
    sinks: Tensor | None = None


class Core(Protocol):
    """The attention core of a model's layer: q (B, n, H, d), k (B, n, K, d), v (B, n, K, e) of this device's tokens
    → (B, n, H, e), with autograd."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor: ...


class LatentCore(Protocol):
    """The attention core of a layer whose keys and values are made from something narrower: q (B, n, H, d) of this
    device's tokens → (B, n, H, e), with autograd.

    Args:
        latent: (n', r), from which `up` makes the rows (B · n, ·) of keys and values.
        turning: (B, n, p) the keys' other part.
        keys_values: k (B, n, H, d) and v (B, n, H, e) from those rows and `turning`.
        call: without sinks.
    """

    def __call__(
        self,
        q: Tensor,
        latent: Tensor,
        turning: Tensor,
        up: nn.Module,
        keys_values: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        call: AttentionCall,
    ) -> Tensor: ...
