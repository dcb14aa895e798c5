"""The time of each kind of module in the record, forward and backward: what `pentad profile` reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...models.attention import Attention
from ...models.feed_forward import FeedForward
from ...models.linear_attention import LinearAttention
from ...models.mla import LatentAttention
from ...models.moe import Experts, Moe
from ...models.norms import LayerNorm, RmsNorm
from ...models.routing.router import Router
from ...models.transformer import Transformer
from ...parallel.record.modules import BACKWARD, FORWARD
from ...parallel.record.ring import Recorder

_NAMES: tuple[tuple[type[nn.Module], str], ...] = (
    (Attention, "attention"), (LatentAttention, "attention"), (LinearAttention, "attention"),
    (FeedForward, "ffn"), (Moe, "experts' way"), (Router, "router"), (Experts, "experts"),
    (RmsNorm, "norms"), (LayerNorm, "norms"),
)  # fmt: skip


class ModuleSpans:
    """Hooks on a rank's model that write an entry around each module's forward and backward pass, while switched on.

    A backward pass begins when the gradient of the module's output comes, and ends when that of its input goes on; of
    a module whose input has no history it lasts until the operation's end.

    Args:
        model: this rank's part.
        recorder: of the rank.
        steps: in which they are written.
    """

    def __init__(self, model: Transformer, recorder: Recorder, steps: tuple[int, ...]) -> None:
        self._recorder, self._steps, self._on = recorder, frozenset(steps), False
        self._open: dict[int, list[int]] = {}
        if not steps:
            return
        for module in model.modules():
            name = next((name for kind, name in _NAMES if isinstance(module, kind)), None)
            if name is not None:
                module.register_forward_pre_hook(partial(self._before, name))
                module.register_forward_hook(partial(self._after, name), always_call=True)
        if model.head_op is not None:
            model.head_op.loss = self._around("head", model.head_op.loss)  # type: ignore[method-assign]

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around a step, counted from 1."""
        self._on = step in self._steps
        try:
            yield
        finally:
            self._on = False
            self._open.clear()

    def _around(self, name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def timed(*given: Any) -> Tensor:
            if not self._on:
                return function(*given)
            with self._recorder.span(self._recorder.intern(FORWARD + name)):
                result = function(*given)
            self._watch_backward(name, given[0], result)
            return result

        return timed

    def _before(self, name: str, module: nn.Module, _: Any) -> None:
        if self._on:
            ticket = self._recorder.enter(self._recorder.intern(FORWARD + name))
            self._open.setdefault(id(module), []).append(ticket)

    def _after(self, name: str, module: nn.Module, given: Any, result: Any) -> None:
        tickets = self._open.get(id(module))
        if not tickets:
            return
        self._recorder.exit(tickets.pop())
        if isinstance(result, Tensor) and isinstance(given[0], Tensor):
            self._watch_backward(name, given[0], result)

    def _watch_backward(self, name: str, given: Tensor, result: Tensor) -> None:
        if not torch.is_grad_enabled() or result.grad_fn is None:
            return
        tickets: list[int] = []

        def begin(*_: Any) -> None:
            tickets.append(self._recorder.enter(self._recorder.intern(BACKWARD + name)))

        def end(*_: Any) -> None:
            if tickets:
                self._recorder.exit(tickets.pop())

        result.grad_fn.register_prehook(begin)
        if given.grad_fn is not None:
            given.grad_fn.register_prehook(end)
        elif given.requires_grad:
            given.register_hook(end)
