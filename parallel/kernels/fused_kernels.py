"""PyTorch's fused attention operators as one kind of kernel, with the log-sum-exp and without autograd.

All return the log-sum-exp (natural logarithm), and all backward operators make the row sums of dout · out from the out
that they are given, so they take the out and log-sum-exp of all keys where the keys are only a part. Where they differ
is handled here: the widths of heads they take, heads that share keys, the form of the log-sum-exp and of masks.

Shapes: q (B, n, H, d), k (B, m, K, d), v (B, m, K, e), out (B, n, H, e), lse (B, H, n); hidden (B or 1, n, m) booleans.
"""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class _Options:
    """Of one call, besides its operands.

    Args:
        causal: as of `Kernel`.
        bias: −inf where hidden: (B, H, n, m), or none.
        scale: multiplier of the scores.
        kv_heads: K.
    """

    causal: bool
    bias: Tensor | None
    scale: float
    kv_heads: int


class _Padded:
    """A `Kernel` that fills heads up to the widths that its operator takes, calls it and cuts the results.

    Operands of the operator, and its results, have heads before rows: (B, heads, rows, width).
    """

    def widths(self, key: int, value: int) -> tuple[int, int]:
        """Those of the operands for heads that are so wide."""
        raise NotImplementedError

    def attend(self, q: Tensor, k: Tensor, v: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
        """out and lse (B, H, n or more)."""
        raise NotImplementedError

    def differentiate(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: _Options
    ) -> Grads:
        """dq, dk, dv."""
        raise NotImplementedError

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, hidden: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """out and lse."""
        options = _Options(causal, None if hidden is None else _bias(hidden, q), scale, k.shape[2])
        out, lse = self.attend(*self._operands(q, k, v), options)
        return _result(out, v.shape[-1]), lse[..., : q.shape[1]]

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
        options = _Options(causal, None if hidden is None else _bias(hidden, q), scale, k.shape[2])
        width = self.widths(q.shape[-1], v.shape[-1])[1]
        dy, y = _operand(dout, width), _operand(out, width)
        dq, dk, dv = self.differentiate(dy, *self._operands(q, k, v), y, lse, options)
        return _result(dq, q.shape[-1]), _result(dk, q.shape[-1]), _result(dv, v.shape[-1])

    def _operands(self, q: Tensor, k: Tensor, v: Tensor) -> Grads:
        key, value = self.widths(q.shape[-1], v.shape[-1])
        return _operand(q, key), _operand(k, key), _operand(v, value)


class CpuFlash(_Padded):
    """torch's operator for CPUs, all types; heads of one width; masks are additive, of q's type.

    It gives queries that see nothing the lse 0.
    """

    def widths(self, key: int, value: int) -> tuple[int, int]:
        return max(key, value), max(key, value)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
        return _ops._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, options.causal, attn_mask=options.bias, scale=options.scale
        )

    def differentiate(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: _Options
    ) -> Grads:
        return _ops._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, options.causal, attn_mask=options.bias, scale=options.scale
        )


class Flash(_Padded):
    """FlashAttention-2 on CUDA, fp16 and bf16: no masks; heads of one width, a multiple of 8 up to 256."""

    def widths(self, key: int, value: int) -> tuple[int, int]:
        width = _multiple(max(key, value))
        return width, width

    def attend(self, q: Tensor, k: Tensor, v: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
        assert options.bias is None
        return _ops._scaled_dot_product_flash_attention(q, k, v, 0.0, options.causal, scale=options.scale)[:2]

    def differentiate(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: _Options
    ) -> Grads:
        assert options.bias is None
        # Of dropout, which there is none of: their values are not read.
        seed = torch.empty(2, dtype=torch.uint64, device=q.device)
        unused = torch.empty((), dtype=torch.uint64, device=q.device)
        # A view of a longer log-sum-exp gives wrong gradients.
        return _ops._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, options.causal, seed, unused,
            scale=options.scale,
        )  # fmt: skip


class Cudnn(_Padded):
    """cuDNN's attention, fp16 and bf16: no masks; widths are multiples of 8, values may have their own.

    Its log-sum-exp is (B, H, n, 1).
    """

    def widths(self, key: int, value: int) -> tuple[int, int]:
        return _multiple(key), _multiple(value)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
        assert options.bias is None
        causal, scale = options.causal, options.scale
        y, lse = _ops._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
        return y, lse.reshape(q.shape[:3])

    def differentiate(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: _Options
    ) -> Grads:
        assert options.bias is None
        seed = torch.empty((), dtype=torch.int64, device=q.device)
        return _ops._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse.contiguous()[..., None], seed, seed, None, None, None, q.shape[2], k.shape[2], 0.0,
            options.causal, scale=options.scale,
        )  # fmt: skip


class Efficient(_Padded):
    """Memory-efficient attention on CUDA, fp16, bf16 and fp32, with masks; widths are multiples of 8.

    It takes as many keys as queries, additive masks of q's type with rows that start at multiples of 16 elements, and
    a log-sum-exp padded to multiples of 32 queries, by +inf: their probabilities are zero.
    """

    def widths(self, key: int, value: int) -> tuple[int, int]:
        return _multiple(key), _multiple(value)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
        return _ops._scaled_dot_product_efficient_attention(
            q, k, v, options.bias, True, 0.0, options.causal, scale=options.scale
        )[:2]

    def differentiate(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: _Options
    ) -> Grads:
        padded = F.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf")).contiguous()
        seed = torch.empty((), dtype=torch.int64, device=q.device)
        dq, dk, dv, _ = _ops._scaled_dot_product_efficient_attention_backward(
            dout, q, k, v, options.bias, out, padded, seed, seed, 0.0, [True, True, True, False], options.causal,
            scale=options.scale,
        )  # fmt: skip
        dk, dv = (x.unflatten(1, (options.kv_heads, -1)).to(lse.dtype).sum(2) for x in (dk, dv))
        return dq, dk, dv

    def _operands(self, q: Tensor, k: Tensor, v: Tensor) -> Grads:
        shared = q.shape[2] // k.shape[2]
        if shared > 1:
            k, v = k.repeat_interleave(shared, 2), v.repeat_interleave(shared, 2)
        return super()._operands(q, k, v)


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
