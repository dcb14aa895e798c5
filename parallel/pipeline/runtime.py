"""What a rank holds while its program runs: inputs, outputs, graphs, gradients, buffers, and what is on its way.

The handlers here do everything a pipeline adds to a step. What a stage computes is given from outside, so nothing in
this file knows of layers. Memory follows the program:

* An input is received into the slot that its token names; the slot's memory is made once and used again.
* An output lives until its send is complete. Backward needs the graph, not the output, so only the graph is kept.
* A gradient of an output is received into a slot too; a gradient of an input lives until its send is complete.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..comm.collectives import Handle, receive, send
from ..comm.mesh import Axis
from ..gradients import WeightGradients
from ..record.kinds import WAIT
from ..record.ring import Recorder
from .execute import Handler
from .kind import Kind
from .needs import Kinds
from .program import OUTSTANDING_SENDS, Op, Program
from .saved import Offloads

Forward = Callable[[int, int, Tensor | None], Tensor]
"""(stage, microbatch, input or None for the first stage) → output, or the loss where the last stage has the head."""


Taken = Callable[[int], Tensor | None]
"""Hands over, and forgets, what a rank has of a microbatch; None where it has none."""


class Vocabulary(Protocol):
    """Embedding, head and loss over all ranks of the pipeline; `index` is the microbatch."""

    def handlers(self, output: Taken, rows_grad: Taken) -> dict[Kind, Handler]:
        """One per kind of vocabulary operation.

        Args:
            output: of the last stage, where this rank has it.
            rows_grad: the gradient of `rows`, where this rank has it.
        """
        ...

    def rows(self, index: int) -> Tensor:
        """The input of the first stage, on its ranks."""
        ...

    def hidden_grad(self, index: int) -> Tensor:
        """The gradient of the last stage's output, on its ranks."""
        ...

    def loss(self, index: int) -> Tensor:
        """The microbatch's loss, on all ranks."""
        ...


@dataclass(frozen=True)
class Hidden:
    """What travels between stages."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class _Graph:
    """A forward whose backward is to come."""

    x: Tensor | None
    output: GradientEdge


_Key = tuple[int, int]
"""(stage, microbatch)"""


def _shares_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


class Runtime:
    """Runs the compute and communication of one rank's program.

    Args:
        program: of all ranks.
        rank: this one, on the pipeline axis.
        forward: a stage's computation.
        hidden: of the tensors between stages.
        channel: (source, destination) on the pipeline axis → their axis, source first.
        stores: the deferred weight gradients of each of this rank's stages.
        vocab: the balanced vocabulary, if the program has one.
        recorder: of this rank.
        offloads: of activations to the host, if the program has any.
    """

    def __init__(
        self,
        program: Program,
        rank: int,
        *,
        forward: Forward,
        hidden: Hidden,
        channel: Callable[[int, int], Axis],
        stores: Mapping[int, WeightGradients],
        vocab: Vocabulary | None,
        recorder: Recorder,
        offloads: Offloads | None = None,
    ) -> None:
        self.program, self.rank, self.hidden = program, rank, hidden
        self._forward, self._channel, self._stores, self._vocab = forward, channel, stores, vocab
        self._recorder, self._wait_code = recorder, recorder.intern(WAIT)
        self._offloads = offloads
        self._last = program.stages - 1
        self._buffers: dict[tuple[Kind, int, int], Tensor] = {}
        self._arriving: dict[tuple[Kind, int, int], Handle] = {}
        self._outputs: dict[_Key, Tensor] = {}
        self._graphs: dict[_Key, _Graph] = {}
        self._grads: dict[_Key, Tensor] = {}
        self._sends: dict[tuple[int, int], deque[tuple[Handle, Tensor]]] = {}
        self._losses: list[Tensor] = []

    @property
    def handlers(self) -> dict[Kind, Handler]:
        """One per kind of operation, for `execute`."""
        handlers: dict[Kind, Handler] = {
            Kinds.FORWARD: self._run_forward,
            Kinds.BACKWARD: self._run_backward,
            Kinds.INPUT_GRAD: self._run_input_grad,
            Kinds.WEIGHT_GRAD: lambda op: self._stores[op.stage].compute(op.index),
            Kinds.SEND_FORWARD: lambda op: self._send(op.stage + 1, self._outputs.pop((op.stage, op.index))),
            Kinds.SEND_BACKWARD: lambda op: self._send(op.stage - 1, self._grads.pop((op.stage, op.index))),
            Kinds.RECV_FORWARD: lambda op: self._receive(op, op.stage - 1),
            Kinds.RECV_BACKWARD: lambda op: self._receive(op, op.stage + 1),
        }
        if self._vocab is not None:
            handlers |= self._vocab.handlers(
                output=lambda index: self._outputs.pop((self._last, index), None),
                rows_grad=lambda index: self._grads.pop((0, index), None),
            )
        if self._offloads is not None:
            handlers |= self._offloads.handlers
        return handlers

    def losses(self) -> list[Tensor]:
        """The microbatches' losses, after the program: on the last stage's rank, on all ranks with a balanced
        vocabulary."""
        if self._vocab is not None:
            return [self._vocab.loss(index) for index in range(self.program.microbatches)]
        losses, self._losses = self._losses, []
        return losses

    def finish(self) -> None:
        """Returns when everything sent has left; call at the end of a program."""
        for queue in self._sends.values():
            while queue:
                queue.popleft()[0].wait()

    def clear(self) -> None:
        """Drops everything, after a program that was left half-way."""
        for held in (self._arriving, self._outputs, self._graphs, self._grads, self._sends, self._losses):
            held.clear()
        if self._offloads is not None:
            self._offloads.clear()

    # Compute --------------------------------------------------------------------------------------------------

    def _run_forward(self, op: Op) -> None:
        key = (op.stage, op.index)
        x = self._input(op)
        with self._catching(op):
            y = self._forward(op.stage, op.index, x)
        if x is not None and _shares_memory(y, x):
            y = y.clone()  # an empty stage: its input may be a slot, which the next receive overwrites
        if torch.is_grad_enabled():
            if x is not None and self._offloads is not None:
                self._offloads.let_go(op.stage, op.index, x)
            self._graphs[key] = _Graph(x, get_gradient_edge(y))
        if op.stage == self._last and self._vocab is None:
            self._losses.append(y.detach())
        else:
            self._outputs[key] = y.detach()
        self._sweep()

    def _catching(self, op: Op) -> AbstractContextManager[None]:
        if self._offloads is None or not torch.is_grad_enabled():
            return nullcontext()
        return self._offloads.catching(op.stage, op.index)

    def _input(self, op: Op) -> Tensor | None:
        if op.stage == 0:
            if self._vocab is None:
                return None
            x = self._vocab.rows(op.index)
        else:
            x = self._arrived(Kinds.RECV_FORWARD, op, self._outputs, op.stage - 1)
        return x.detach().requires_grad_(torch.is_grad_enabled())

    def _run_backward(self, op: Op) -> None:
        graph = self._graphs.pop((op.stage, op.index))
        grad = self._output_grad(op)
        torch.autograd.backward((graph.output,), (grad,))
        if graph.x is not None:
            dx = graph.x.grad
            assert dx is not None
            if grad is not None and _shares_memory(dx, grad):
                dx = dx.clone()  # as in forward
            self._grads[op.stage, op.index] = dx
        self._sweep()

    def _run_input_grad(self, op: Op) -> None:
        with self._stores[op.stage].deferring(op.index):
            self._run_backward(op)

    def _output_grad(self, op: Op) -> Tensor | None:
        if op.stage < self._last:
            return self._arrived(Kinds.RECV_BACKWARD, op, self._grads, op.stage + 1)
        if self._vocab is None:
            return None  # the loss itself: its factor is already in it
        return self._vocab.hidden_grad(op.index)

    # Communication --------------------------------------------------------------------------------------------

    def _send(self, to_stage: int, x: Tensor) -> None:
        channel = (self.rank, self.program.placement[to_stage])
        queue = self._sends.setdefault(channel, deque())
        if len(queue) >= OUTSTANDING_SENDS:
            with self._wait():
                queue.popleft()[0].wait()
        x = x.contiguous()
        queue.append((send(x, self._channel(*channel), 1), x))

    def _receive(self, op: Op, from_stage: int) -> None:
        slot = (op.kind, op.stage, op.slot)
        buffer = self._buffers.get(slot)
        if buffer is None:
            buffer = self._buffers[slot] = self.hidden.empty()
            if self._offloads is not None:
                self._offloads.leave(buffer)  # it is used again and again: freeing it would free nothing
        axis = self._channel(self.program.placement[from_stage], self.rank)
        self._arriving[op.kind, op.stage, op.index] = receive(buffer, axis, 0)

    def _arrived(self, kind: Kind, op: Op, local: dict[_Key, Tensor], neighbour: int) -> Tensor:
        """What the neighbouring stage made, from its slot or, on the same rank, as it is."""
        handle = self._arriving.pop((kind, op.stage, op.index), None)
        if handle is None:
            return local.pop((neighbour, op.index))
        with self._wait():
            return handle.wait()

    def _sweep(self) -> None:
        """Lets go of what has been sent."""
        for queue in self._sends.values():
            while queue and queue[0][0].done():
                queue.popleft()

    @contextmanager
    def _wait(self) -> Iterator[None]:
        with self._recorder.span(self._wait_code, on_device=True):
            yield
