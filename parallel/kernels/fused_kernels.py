"""PyTorch's fused attention operators as one kind of kernel, with the log-sum-exp and without autograd.

All return the log-sum-exp (natural logarithm), and all backward operators make the row sums of dout · out from the out
that they are given, so they take the out and log-sum-exp of all keys where the keys are only a part. Where they differ
is handled here: the widths of heads they take, heads that share keys, the form of the log-sum-exp and of masks.

Shapes: q (B, n, H, d), k (B, m, K, d), v (B, m, K, e), out (B, n, H, e), lse (B, H, n); hidden (B or 1, n, m) booleans.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

_ops = torch.ops.aten
Grads = tuple[Tensor, Tensor, Tensor]


class Kernel(Protocol):
    """Attention to a block of keys.

    `causal`: query i sees keys 0 … i; only where n = m, since the operators do not agree which corner the diagonal
    starts from otherwise. `hidden`: what queries do not see. Rows that see nothing may have any out and lse, also none
    that is a number, and have to be given the lse +inf in backward.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, hidden: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        hidden: Tensor | None,
        scale: float,
    ) -> Grads: ...


class CpuFlash:
    """torch's operator for CPUs, all types; heads of one width; masks are additive, of q's type.

    It gives queries that see nothing the lse 0.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, hidden: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """out and lse."""
        width = max(q.shape[-1], v.shape[-1])
        qs, ks, vs = (_operand(x, width) for x in (q, k, v))
        bias = None if hidden is None else _bias(hidden, q)
        y, lse = _ops._scaled_dot_product_flash_attention_for_cpu(qs, ks, vs, 0.0, causal, attn_mask=bias, scale=scale)
        return _result(y, v.shape[-1]), lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        hidden: Tensor | None,
        scale: float,
    ) -> Grads:
        """dq, dk, dv."""
        width = max(q.shape[-1], v.shape[-1])
        dy, qs, ks, vs, y = (_operand(x, width) for x in (dout, q, k, v, out))
        bias = None if hidden is None else _bias(hidden, q)
        dq, dk, dv = _ops._scaled_dot_product_flash_attention_for_cpu_backward(
            dy, qs, ks, vs, y, lse, 0.0, causal, attn_mask=bias, scale=scale
        )
        return _result(dq, q.shape[-1]), _result(dk, q.shape[-1]), _result(dv, v.shape[-1])


class Flash:
    """FlashAttention-2 on CUDA, fp16 and bf16: no masks; heads of one width, a multiple of 8 up to 256."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, hidden: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """out and lse."""
        assert hidden is None
        width = _multiple(max(q.shape[-1], v.shape[-1]))
        qs, ks, vs = (_operand(x, width) for x in (q, k, v))
        y, lse = _ops._scaled_dot_product_flash_attention(qs, ks, vs, 0.0, causal, scale=scale)[:2]
        return _result(y, v.shape[-1]), lse[..., : q.shape[1]]

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        hidden: Tensor | None,
        scale: float,
    ) -> Grads:
        """dq, dk, dv."""
        assert hidden is None
        width = _multiple(max(q.shape[-1], v.shape[-1]))
        dy, qs, ks, vs, y = (_operand(x, width) for x in (dout, q, k, v, out))
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
        unused = torch.zeros((), dtype=torch.uint64, device=q.device)
        # A view of a longer log-sum-exp gives wrong gradients.
        dq, dk, dv = _ops._scaled_dot_product_flash_attention_backward(
            dy, qs, ks, vs, y, lse.contiguous(), None, None, q.shape[1], k.shape[1], 0.0, causal, seed, unused,
            scale=scale,
        )  # fmt: skip
        return _result(dq, q.shape[-1]), _result(dk, q.shape[-1]), _result(dv, v.shape[-1])


class Cudnn:
    """cuDNN's attention, fp16 and bf16: no masks; widths are multiples of 8, values may have their own.

    Its log-sum-exp is (B, H, n, 1).
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, hidden: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """out and lse."""
        assert hidden is None
        qs, ks, vs = (_operand(x, _multiple(x.shape[-1])) for x in (q, k, v))
        y, lse = _ops._scaled_dot_product_cudnn_attention(qs, ks, vs, None, True, 0.0, causal, scale=scale)[:2]
        return _result(y, v.shape[-1]), lse.reshape(q.shape[0], q.shape[2], q.shape[1])

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        hidden: Tensor | None,
        scale: float,
    ) -> Grads:
        """dq, dk, dv."""
        assert hidden is None
        dy, qs, ks, vs, y = (_operand(x, _multiple(x.shape[-1])) for x in (dout, q, k, v, out))
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        dq, dk, dv = _ops._scaled_dot_product_cudnn_attention_backward(
            dy, qs, ks, vs, y, lse.contiguous()[..., None], seed, seed, None, None, None, q.shape[1], k.shape[1], 0.0,
            causal, scale=scale,
        )  # fmt: skip
        return _result(dq, q.shape[-1]), _result(dk, q.shape[-1]), _result(dv, v.shape[-1])


class Efficient:
    """Memory-efficient attention on CUDA, fp16, bf16 and fp32, with masks; widths are multiples of 8.

    It takes as many keys as queries, additive masks of q's type with rows that start at multiples of 16 elements, and
    a log-sum-exp padded to multiples of 32 queries, by +inf: their probabilities are zero.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, hidden: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """out and lse."""
        qs, ks, vs = self._operands(q, k, v)
        bias = None if hidden is None else _bias(hidden, q)
        y, lse = _ops._scaled_dot_product_efficient_attention(qs, ks, vs, bias, True, 0.0, causal, scale=scale)[:2]
        return _result(y, v.shape[-1]), lse[..., : q.shape[1]]

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        hidden: Tensor | None,
        scale: float,
    ) -> Grads:
        """dq, dk, dv."""
        qs, ks, vs = self._operands(q, k, v)
        dy, y = (_operand(x, _multiple(x.shape[-1])) for x in (dout, out))
        bias = None if hidden is None else _bias(hidden, q)
        padded = F.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf")).contiguous()
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        dq, dk, dv, _ = _ops._scaled_dot_product_efficient_attention_backward(
            dy, qs, ks, vs, bias, y, padded, seed, seed, 0.0, [True, True, True, False], causal, scale=scale
        )
        dk, dv = (x.unflatten(1, (k.shape[2], -1)).to(lse.dtype).sum(2) for x in (dk, dv))
        return _result(dq, q.shape[-1]), _result(dk, q.shape[-1]), _result(dv, v.shape[-1])

    @staticmethod
    def _operands(q: Tensor, k: Tensor, v: Tensor) -> Grads:
        shared = q.shape[2] // k.shape[2]
        if shared > 1:
            k, v = k.repeat_interleave(shared, 2), v.repeat_interleave(shared, 2)
        return (
            _operand(q, _multiple(q.shape[-1])),
            _operand(k, _multiple(k.shape[-1])),
            _operand(v, _multiple(v.shape[-1])),
        )


def _multiple(width: int) -> int:
    return -(-width // 8) * 8


def _operand(x: Tensor, width: int) -> Tensor:
    """(B, rows, heads, w) → (B, heads, rows, width), heads filled up with zeros, which change no product."""
    if x.shape[-1] < width:
        x = F.pad(x, (0, width - x.shape[-1]))
    x = x.transpose(1, 2)
    return x if x.stride(-1) == 1 else x.contiguous()


def _result(y: Tensor, width: int) -> Tensor:
    """(B, heads, rows, padded) → (B, rows, heads, width)."""
    return y[..., :width].transpose(1, 2)


def _bias(hidden: Tensor, q: Tensor) -> Tensor:
    """−inf where hidden, in q's type: (B, H, n, m), the same memory for all heads, rows 16 elements aligned."""
    sequences, rows, keys = hidden.shape
    bias = q.new_zeros(sequences, 1, rows, -(-keys // 16) * 16)[..., :keys]
    bias.masked_fill_(hidden[:, None], float("-inf"))
    return bias.expand(q.shape[0], q.shape[2], -1, -1)
