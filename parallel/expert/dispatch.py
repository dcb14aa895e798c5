"""Dispatchers: they bring tokens to the ranks of their experts and the results back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ..collectives import all_to_all
from ..grouped import Groups
from ..mesh import Axis
from .routing import Routing

T = TypeVar("T")


class Experts(Protocol):
    """rows (R, h), expert by expert → their outputs (R, h), multiplied by `weights` (R,) where these are given."""

    def __call__(self, rows: Tensor, groups: Groups, weights: Tensor | None) -> Tensor: ...


class Dispatcher(Protocol):
    """Runs the experts of x (n, h) and `beside`, whose compute may hide the communication.

    Returns:
        The weighted sum of the experts' outputs (n, h), and what `beside` returned.
    """

    def __call__(self, x: Tensor, routing: Routing, experts: Experts, beside: Callable[[], T]) -> tuple[Tensor, T]: ...


class AllToAll:
    """Every token travels to each of its experts' ranks.

    Args:
        experts: of the whole layer.
        ep: the ranks that share the experts.
        etp: the ranks that share each expert's inner width.
        weigh_before: the weights are multiplied before the experts' second matrix.
    """

    def __init__(self, experts: int, ep: Axis, etp: Axis, *, weigh_before: bool = False) -> None:
        self.experts, self.ep, self.etp, self.weigh_before = experts, ep, etp, weigh_before

    def __call__(self, x: Tensor, routing: Routing, experts: Experts, beside: Callable[[], T]) -> tuple[Tensor, T]:
        n, k = routing.experts.shape
        flat = routing.experts.reshape(-1)
        order = torch.argsort(torch.where(flat < 0, self.experts, flat), stable=True)
        counts = torch.bincount(flat[flat >= 0], minlength=self.experts)
        rows = int(counts.sum())
        order = order[:rows]
        per_rank = counts.view(self.ep.size, -1)
        send = per_rank.sum(1).tolist()
        arriving = all_to_all(per_rank, self.ep).wait().view(self.ep.size, -1)  # (source, expert)
        receive = arriving.sum(1).tolist()
        sent = _AllToAll.apply(x.index_select(0, order // k), self.ep, send, receive)
        starts = (torch.cumsum(arriving.reshape(-1), 0) - arriving.reshape(-1)).view_as(arriving)
        major = torch.cat(
            [torch.arange(s, s + c) for s, c in zip(starts.t().reshape(-1).tolist(), arriving.t().reshape(-1).tolist())]
        )
        other = beside()
        out = experts(sent.index_select(0, major), Groups(tuple(arriving.sum(0).tolist())), None)
        back = _AllToAll.apply(out.index_select(0, torch.argsort(major)), self.ep, receive, send)
        place = torch.zeros(n * k, dtype=torch.long)
        place[order] = torch.arange(rows)
        if rows == 0:
            return x * 0 + back.sum() * 0, other
        gathered = back.index_select(0, place).view(n, k, -1)
        y = torch.bmm(routing.weights.to(x.dtype).unsqueeze(1), gathered).squeeze(1)
        return y, other


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis, send: list[int], receive: list[int]) -> Tensor:
        ctx.axis, ctx.send, ctx.receive = axis, send, receive
        return all_to_all(x, axis, send, receive).wait()

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return all_to_all(grad.contiguous(), ctx.axis, ctx.receive, ctx.send).wait(), None, None, None
