"""Softmax attention written out: the reference of every kernel, and what runs where there is none."""

from __future__ import annotations

import torch
from torch import Tensor

from .mask import Mask
from .merge import row_sums
from .precision import precise


class PlainMaths:
    """Softmax attention written out: any mask, device and type; makes all scores at once."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
        """out (B, n, H, e) in q's type and lse (B, H, n)."""
        scores = _scores(q, k, mask, scale)
        lse = scores.logsumexp(dim=-1)
        y = torch.einsum("bkgij,bjke->bikge", _probabilities(scores, lse), v.to(scores.dtype))
        return y.flatten(2, 3).to(q.dtype), lse.flatten(1, 2)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv in lse's precision."""
        groups = k.shape[2]
        probs = _probabilities(_scores(q, k, mask, scale), lse.unflatten(1, (groups, -1)))
        dy, x = (y.to(lse.dtype).unflatten(2, (groups, -1)) for y in (dout, q))
        dv = torch.einsum("bkgij,bikge->bjke", probs, dy)
        dprobs = torch.einsum("bikge,bjke->bkgij", dy, v.to(lse.dtype))
        dscores = (dprobs - row_sums(dout, out).unflatten(1, (groups, -1))[..., None]) * probs * scale
        dq = torch.einsum("bkgij,bjkd->bikgd", dscores, k.to(lse.dtype)).flatten(2, 3)
        return dq, torch.einsum("bkgij,bikgd->bjkd", dscores, x), dv


def _scores(q: Tensor, k: Tensor, mask: Mask, scale: float) -> Tensor:
    """(B, K, G, n, m), −inf where hidden."""
    dtype = precise(q.dtype)
    x = q.to(dtype).unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("bikgd,bjkd->bkgij", x, k.to(dtype)) * scale
    return scores.masked_fill(~mask.dense(q.device)[:, :, None], float("-inf"))


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    return (scores - lse.masked_fill(lse == float("-inf"), float("inf"))[..., None]).exp()
