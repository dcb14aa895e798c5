"""The attention kernels of one device, behind `parallel.kernels.interfaces.LocalAttention`."""

from __future__ import annotations

import sys
from functools import lru_cache

import torch
from torch import Tensor

from ...configs.errors import UserError
from .blockwise import Blockwise
from .fused_attention import Fused, pieces
from .fused_kernels import CpuFlash, Cudnn, Efficient, Flash
from .interfaces import LocalAttention
from .mask import Mask, TokenIndex
from .packed_flash import WIDEST, PackedFlash, documents_of, packs
from .plain_maths import PlainMaths

_LONG = 1024
"""Queries of a block without a mask from which on torch's CPU operator is the faster."""


class Cpu:
    """The `LocalAttention` of CPUs.

    torch's operator is up to a fifth faster than `Blockwise` for thousands of tokens without a mask, and slower for
    hundreds (forward and backward, fp32 and bf16, one core with AVX-512, torch 2.13; equal at about 1024).
    """

    def __init__(self) -> None:
        kernel = CpuFlash()
        self._fused, self._blockwise = Fused(kernel, kernel), Blockwise()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
        """out (B, n, H, e) in q's type and lse (B, H, n)."""
        return self.best(q, v, mask).forward(q, k, v, mask, scale)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv, in the operands' type or in lse's."""
        return self.best(q, v, mask).backward(dout, q, k, v, out, lse, mask, scale)

    def best(self, q: Tensor, v: Tensor, mask: Mask) -> LocalAttention:
        """What runs for these operands."""
        if q.shape[-1] != v.shape[-1] or q.shape[1] < _LONG:
            return self._blockwise
        found = mask.once(pieces, mask.queries, mask.keys, mask.window, len(q))
        long = all(piece.last - piece.first >= _LONG and not piece.masked for piece in found)
        return self._fused if long else self._blockwise


class Cuda:
    """The `LocalAttention` of CUDA devices: fused kernels for the types they know, else plain maths."""

    def __init__(self) -> None:
        efficient = Efficient()
        self._precise, self._plain = Fused(efficient, efficient), PlainMaths()
        self._flash, self._cudnn, self._packed = Fused(Flash(), efficient), Fused(Cudnn(), efficient), PackedFlash()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
        """out (B, n, H, e) in q's type and lse (B, H, n)."""
        return self.best(q, v, mask).forward(q, k, v, mask, scale)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv, in the operands' type or in lse's."""
        return self.best(q, v, mask).backward(dout, q, k, v, out, lse, mask, scale)

    def best(self, q: Tensor, v: Tensor, mask: Mask) -> LocalAttention:
        """What runs for these operands."""
        if q.dtype == torch.float64:
            return self._plain
        if q.dtype == torch.float32:
            return self._precise
        fits = max(q.shape[-1], v.shape[-1]) <= WIDEST
        plain = mask.window is None and mask.queries.documents is None and mask.keys.documents is None
        packed = fits and not plain and mask.once(documents_of, mask.queries, mask.keys, len(q)) is not None
        if packed and packs(q.device, q.dtype):
            return self._packed
        if self._is_for_cudnn(q, v):
            return self._cudnn
        return self._flash if fits else self._precise

    def _is_for_cudnn(self, q: Tensor, v: Tensor) -> bool:
        """From Hopper on, where cuDNN's kernels take about 0.6 of the time of FlashAttention-2.

        Their backward has no deterministic form; FlashAttention's has one, for heads filled up to one width.
        """
        if torch.are_deterministic_algorithms_enabled() or torch.cuda.get_device_capability(q.device) < (9, 0):
            return False
        return cudnn_runs(q.device, q.dtype, q.shape[-1], v.shape[-1])


@lru_cache(maxsize=16)
def cudnn_runs(device: torch.device, dtype: torch.dtype, width: int, value: int) -> bool:
    """Whether cuDNN's attention computes there what it should; told on the standard error stream where it does not.

    Args:
        width, value: of a query or key head and of a value head.
    """
    try:
        check_local_attention(Fused(Cudnn(), Efficient()), device, dtype, width, value)
    except UserError as error:
        print(f"warning: cuDNN's {error}: FlashAttention-2 is used, which is slower", file=sys.stderr, flush=True)
        return False
    return True


def local_attention(device: torch.device) -> LocalAttention:
    """The fastest implementation for the device."""
    return Cpu() if device.type == "cpu" else Cuda()


def check_local_attention(
    local: LocalAttention, device: torch.device, dtype: torch.dtype, width: int, value: int
) -> None:
    """Compares an implementation with plain maths on a few tokens of every kind of mask.

    Its operators belong to PyTorch's inner parts, whose forms differ between versions: better before the first step
    than a loss that is slightly wrong.

    Args:
        width, value: of a query or key head and of a value head.

    Raises:
        UserError: it fails or differs by more than rounding.
    """
    tolerance = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float32: 1e-2, torch.float64: 1e-10}[dtype]
    draws = torch.Generator().manual_seed(0)
    documents = torch.tensor([[0] * 130 + [1] * 70])
    early, late = TokenIndex.whole(200).part(0, 72), TokenIndex.whole(200).part(136, 200)
    cases = {
        "causal": Mask.of(TokenIndex.whole(200)),
        "full": Mask(late, early),
        "documents": Mask.of(TokenIndex.whole(200, documents)),
        "window": Mask.of(TokenIndex.whole(200), 9),
        "nothing seen": Mask(TokenIndex.whole(200).part(40, 104), TokenIndex.whole(200).part(72, 136)),
    }
    shared = 2 if width == value else 4  # heads share keys only where widths are one
    for name, mask in cases.items():
        counts = ((mask.queries.count, 4, width), (mask.keys.count, shared, width), (mask.keys.count, shared, value))
        q, k, v = (torch.randn(1, *shape, generator=draws).to(device, dtype) for shape in counts)
        dout = torch.randn(1, mask.queries.count, 4, value, generator=draws).to(device, dtype)
        expected = _everything(PlainMaths(), dout.double(), q.double(), k.double(), v.double(), mask)
        try:
            found = _everything(local, dout, q, k, v, mask)
        except RuntimeError as error:
            raise UserError(
                f"attention ({name}) does not run with PyTorch {torch.__version__} on {device}: "
                f"{str(error).partition(chr(10))[0]}"
            ) from error
        for what, mine, theirs in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=True):
            if not torch.allclose(mine.double(), theirs, rtol=tolerance, atol=tolerance):
                raise UserError(
                    f"attention ({name}) gives a wrong {what} with PyTorch {torch.__version__} on {device} for "
                    f"{dtype} and heads of {width} and {value}"
                )


def _everything(local: LocalAttention, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, ...]:
    scale = q.shape[-1] ** -0.5
    out, lse = local.forward(q, k, v, mask, scale)
    return out, lse, *local.backward(dout, q, k, v, out, lse, mask, scale)
