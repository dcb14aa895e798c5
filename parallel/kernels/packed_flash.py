"""FlashAttention over whole sequences of tokens, packed with documents or seen through a window, in one kernel.

What each query sees follows from the ends of the documents and the window's width, so there are neither masks nor one
kernel a document.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from .mask import Mask, TokenIndex
from .plain_maths import PlainMaths
from .upload import upload

_ops = torch.ops.aten
WIDEST = 256
"""The widest heads of the kernel."""


@dataclass(frozen=True)
class Documents:
    """Documents of B sequences, one after another.

    Args:
        bounds: (D + 1,) int32, on the host: where each starts, and where the last ends; none: each is a sequence.
        longest: tokens of the longest one.
    """

    bounds: Tensor | None
    longest: int


def documents_of(queries: TokenIndex, keys: TokenIndex, batch: int) -> Documents | None:
    """The documents of `batch` sequences, if queries and keys are the same tokens, in their order without a gap; else
    none, and where a document goes on behind another one."""
    length = queries.count
    if not length or keys.count != length or not torch.equal(queries.order, keys.order):
        return None
    if not bool((queries.order.diff(dim=1) == 1).all()):
        return None
    mine, theirs = queries.documents, keys.documents
    if mine is None or theirs is None:
        return Documents(None, length) if mine is theirs else None
    if not torch.equal(mine, theirs):
        return None
    steps = mine.expand(batch, -1).diff(dim=1)
    if bool((steps < 0).any()):
        return None
    starts = F.pad(steps > 0, (1, 0), value=True).reshape(-1).nonzero()[:, 0]
    bounds = F.pad(starts, (0, 1), value=batch * length).int()
    return Documents(bounds, int(bounds.diff().max()))


class PackedFlash:
    """The `LocalAttention` of masks that have `documents_of`, in half precision."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
        """out (B, n, H, e) in q's type and lse (B, H, n)."""
        (batch, length, heads, _), width = q.shape, v.shape[-1]
        found, bounds = _documents(mask, q)
        out, lse = _ops._flash_attention_forward(
            *_operands(found, q, k, v), bounds, bounds, found.longest, found.longest, 0.0, True, False, scale=scale,
            **_window(mask),
        )[:2]  # fmt: skip
        if bounds is not None:
            lse = lse.view(heads, batch, length).transpose(0, 1)
        return out.view(batch, length, heads, -1)[..., :width], lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv in the operands' type."""
        found, bounds = _documents(mask, q)
        if bounds is not None:
            lse = lse.transpose(0, 1).reshape(q.shape[2], -1)
        # Of dropout, which there is none of: their values are not read.
        seed = torch.empty(2, dtype=torch.uint64, device=q.device)
        unused = torch.empty((), dtype=torch.uint64, device=q.device)
        dy, y = _operands(found, dout, out, width=max(q.shape[-1], v.shape[-1]))
        grads = _ops._flash_attention_backward(
            dy, *_operands(found, q, k, v), y, lse.contiguous(), bounds, bounds, found.longest, found.longest, 0.0,
            True, seed, unused, scale=scale, **_window(mask),
        )  # fmt: skip
        dq, dk, dv = (grad.view(*x.shape[:3], -1)[..., : x.shape[-1]] for grad, x in zip(grads, (q, k, v), strict=True))
        return dq, dk, dv


def _documents(mask: Mask, q: Tensor) -> tuple[Documents, Tensor | None]:
    found = mask.once(documents_of, mask.queries, mask.keys, len(q))
    assert found is not None
    return found, None if found.bounds is None else mask.once(upload, found.bounds, q.device)


def _window(mask: Mask) -> dict[str, int]:
    return {} if mask.window is None else {"window_size_left": mask.window - 1, "window_size_right": 0}


def _operands(found: Documents, *given: Tensor, width: int = 0) -> list[Tensor]:
    """Each (B, n, heads, w) → (B, n, heads, wide), with documents (B · n, heads, wide); zeros change no product."""
    width = -(-max(width, *(x.shape[-1] for x in given)) // 8) * 8
    made = []
    for x in given:
        x = F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x
        x = x if x.stride(-1) == 1 else x.contiguous()
        made.append(x if found.bounds is None else x.flatten(0, 1))
    return made


@lru_cache(maxsize=16)
def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `PackedFlash` computes there what it should; told on the standard error stream where it does not.

    Its operators belong to PyTorch's inner parts, whose forms differ between versions.
    """
    documents = torch.tensor([[0] * 70 + [1] * 10, [0] * 3 + [1] * 50 + [2] * 27])
    draws = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(2, 80, heads, 16, generator=draws).to(device, dtype) for heads in (4, 2, 2, 4))
    for mask in (
        Mask.of(TokenIndex.whole(80, documents)),
        Mask.of(TokenIndex.whole(80), 9),
        Mask.of(TokenIndex.whole(80, documents), 9),
    ):
        x, y, z = q.double(), k.double(), v.double()
        expected = PlainMaths().forward(x, y, z, mask, 0.25)
        reference = PlainMaths().backward(dout.double(), x, y, z, *expected, mask, 0.25)
        try:
            out, lse = PackedFlash().forward(q, k, v, mask, 0.25)
            found = (out, lse, *PackedFlash().backward(dout, q, k, v, out, lse, mask, 0.25))
        except (RuntimeError, TypeError) as error:
            reason = f"does not run with PyTorch {torch.__version__} ({str(error).partition(chr(10))[0]})"
            break
        pairs = zip(found, (*expected, *reference), strict=True)
        if not all(torch.allclose(mine.double(), theirs, rtol=5e-2, atol=5e-2) for mine, theirs in pairs):
            reason = f"is wrong with PyTorch {torch.__version__}"
            break
    else:
        return True
    print(
        f"warning: FlashAttention over packed documents {reason}: blocks with masks are used, which are slower",
        file=sys.stderr,
        flush=True,
    )
    return False
