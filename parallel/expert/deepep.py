"""DeepEP as a dispatcher (github.com/deepseek-ai/DeepEP, `Buffer`'s normal kernels), where it is installed.

A token travels once to each rank that has an expert of it, and its results are added up there before they travel back,
so that the weights are always multiplied in on the experts' side. bfloat16 only.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...configs.errors import Problem, UserError
from ...configs.validation.kernels import deepep_problem
from ..comm.mesh import Axis
from .dispatch import Arrived, Phases
from .plan import RowPlan, at_home
from .routing import DeepEpLayout, Routing

KEY = "model.moe.dispatcher"
OpenBuffer = Callable[[int], Any]


def opener(ep: Axis, etp: Axis) -> OpenBuffer:
    """Makes DeepEP's buffer for tokens of so many bytes.

    Raises:
        UserError: DeepEP cannot be used here.
    """
    problem = deepep_problem("bf16", etp.size)
    if problem is not None:
        raise UserError(problem)
    if not torch.cuda.is_available():
        raise UserError(Problem(KEY, "deepep needs CUDA devices, and there are none; set all_to_all"))
    try:
        buffers = importlib.import_module("deep_ep").Buffer
    except (ImportError, AttributeError) as error:
        message = f"deepep needs the package deep_ep ({error}); install it or set all_to_all"
        raise UserError(Problem(KEY, message)) from error

    def open_buffer(token_bytes: int) -> Any:
        configs = [buffers.get_dispatch_config(ep.size), buffers.get_combine_config(ep.size)]
        near = max(config.get_nvl_buffer_size_hint(token_bytes, ep.size) for config in configs)
        far = max(config.get_rdma_buffer_size_hint(token_bytes, ep.size) for config in configs)
        return buffers(ep.group, near, far)

    return open_buffer


@dataclass
class _Trip:
    """The tokens of a layer, wherever they are now."""

    buffer: Any
    axis: Axis
    routing: Routing
    experts: int
    tokens: Tensor
    weights: Tensor
    event: Any = None

    @property
    def layout(self) -> DeepEpLayout:
        layout = self.routing.findings.deepep
        assert layout is not None
        return layout

    @property
    def plan(self) -> RowPlan:
        layout = self.layout
        if layout.plan is None:
            layout.plan = at_home(layout.ids, layout.counts)
        return layout.plan


class DeepEp(Phases[_Trip]):
    """DeepEP's dispatch and combine around the experts.

    Args:
        experts: of the whole layer.
        ep: the ranks that share the experts.
        open_buffer: makes the buffer at the first use, as `opener` does.
        weigh_before: the weights are multiplied before the experts' second matrix, instead of right after it.
    """

    def __init__(self, experts: int, ep: Axis, open_buffer: OpenBuffer, *, weigh_before: bool = False) -> None:
        super().__init__()
        self.experts, self.ep, self.weigh_before = experts, ep, weigh_before
        self._open, self._buffer = open_buffer, None

    def prepare(self, x: Tensor, routing: Routing) -> list[_Trip]:
        if x.dtype != torch.bfloat16:
            raise UserError(Problem(KEY, f"deepep moves bfloat16, the model has {x.dtype}; set train.dtype=bf16"))
        if self._buffer is None:
            self._buffer = self._open(x.shape[1] * x.element_size())
        return [_Trip(self._buffer, self.ep, routing, self.experts, x, routing.weights.float())]

    def dispatch(self, journey: _Trip) -> None:
        journey.tokens, journey.weights = _There.apply(journey.tokens, journey.weights, journey)

    def arrange(self, journey: _Trip) -> Arrived:
        journey.event.current_stream_wait()
        plan, (m, k) = journey.plan, journey.weights.shape
        rows = self.rows.spread(journey.tokens, plan.pairs // k, plan.places)
        weights = None
        if self.weigh_before:
            column = journey.weights.reshape(m * k, 1)
            weights = self.rows.spread(column, plan.pairs, plan.places.view(m * k, 1)).view(-1)
        return Arrived(rows, plan.chunks[0].groups, weights)

    def collect(self, journey: _Trip, out: Tensor) -> None:
        weights = None if self.weigh_before else journey.weights
        journey.tokens = self.rows.combine(out, journey.plan.places, weights)

    def combine(self, journey: _Trip) -> None:
        journey.tokens = _Back.apply(journey.tokens, journey)

    def finish(self, journeys: list[_Trip], routing: Routing) -> Tensor:
        return journeys[0].tokens


def _recorded(axis: Axis, kind: str, x: Tensor, call: Callable[[], Any]) -> Any:
    """One call of a kernel, in the record; on the host it ends when the kernel is enqueued."""
    recorder = axis.recorder
    if recorder is None:
        return call()
    nbytes = x.numel() * x.element_size()
    with recorder.span(recorder.intern(kind), axis=axis.code, nbytes=nbytes, seq=axis.number(kind)):
        return call()


def _send(trip: _Trip, x: Tensor, **layout: Any) -> tuple[Any, ...]:
    """Tokens (n, h) to their experts' ranks; returns what `Buffer.dispatch` returns."""
    options = {"previous_event": trip.buffer.capture(), "async_finish": True, "allocate_on_comm_stream": True}
    return _recorded(trip.axis, "deepep_dispatch", x, lambda: trip.buffer.dispatch(x, **layout, **options))


def _sum(trip: _Trip, x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Tokens (m, h) back to where they came from, there added up."""
    handle = trip.layout.handle
    options = {"previous_event": trip.buffer.capture(), "async_finish": True, "allocate_on_comm_stream": True}
    total, weights, event = _recorded(
        trip.axis, "deepep_combine", x, lambda: trip.buffer.combine(x, handle, topk_weights=weights, **options)
    )
    event.current_stream_wait()
    return total, weights


class _There(torch.autograd.Function):
    """Tokens and weights (n, K) to the ranks of the experts. Use the result after `trip.event`."""

    @staticmethod
    def forward(ctx, x: Tensor, weights: Tensor, trip: _Trip) -> tuple[Tensor, Tensor]:
        ctx.trip = trip
        findings = trip.routing.findings
        if findings.deepep is not None:
            tokens, *_, trip.event = _send(trip, x, handle=trip.layout.handle)
            return tokens, trip.layout.weights.clone()
        ids = trip.routing.experts
        per_rank, per_node, per_expert, in_rank, _ = trip.buffer.get_dispatch_layout(ids, trip.experts)
        tokens, ids, weights, counts, handle, trip.event = _send(
            trip,
            x,
            topk_idx=ids,
            topk_weights=weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            num_tokens_per_expert=per_expert,
            is_token_in_rank=in_rank,
        )
        findings.deepep = DeepEpLayout(handle, ids, weights.detach(), list(counts))
        return tokens, weights

    @staticmethod
    def backward(ctx, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return *_sum(ctx.trip, grads[0].contiguous(), grads[1].float().contiguous()), None


class _Back(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        return _sum(trip, x, None)[0]

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        trip = ctx.trip
        tokens, *_, event = _send(trip, grad.contiguous(), handle=trip.layout.handle)
        event.current_stream_wait()
        return tokens, None
