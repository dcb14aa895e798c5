"""TokenRing: keys and values stay, queries go round (TokenRing, arXiv 2412.20501).

Queries travel toward lower ranks. What a rank's keys gave a visiting query returns straight to its owner, against the
stream, while the next ones arrive: both directions of the links are in use. With zigzag dealing-out all queries of a
rank see something on lower ranks, and after the wrap-around only the back half does and travels on.

The published method has no backward. Here queries make the same journey again, with the gradient of their output, its
product with the output (Δ) and the log-sum-exp; their own gradients return as the results did, and those of keys and
values never leave their rank.

Queries are as wide as their heads, keys as the key-value heads: this pays where the two are nearly equal in number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...configs.schema_parallel import ContextConfig
from ..comm.collectives import Handle, receive, send
from ..comm.mesh import Axis, Mesh
from ..kernels.attention import differentiable
from ..kernels.interfaces import AttentionCall, LocalAttention, to_be_summed
from ..kernels.merge import merge_, row_sums
from ..kernels.upload import upload
from .packed_tensors import Like, PackedTensors
from .ring_plan import RingPlan, RingPlans, RowSelection
from .ring_transfer import Lines, RingTransfer, finish


class TokenRing:
    """A `Core` in which queries go round. One serves all layers of a rank.

    Args:
        axis: the ranks, for queries, toward lower ones.
        back: the same ranks, for what returns; on NCCL a communicator of its own.
        local: attention to one block.
    """

    def __init__(self, axis: Axis, back: Axis, local: LocalAttention) -> None:
        self._lines, self._local = Lines(axis, back, -1), local
        self._tables = RingPlans(down=True, keys=False)

    @staticmethod
    def of(context: ContextConfig, mesh: Mesh, local: LocalAttention) -> TokenRing:
        """The core of a job; arguments as of `make_core`."""
        return TokenRing(mesh.axis("cp"), mesh.axis("cp_back"), local)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        """See `Core`."""
        course = _Course(self._tables.of(call.layout, call.window), self._lines, self._local, call.scale)
        return differentiable(q, k, v, call.sinks, course)


@dataclass(frozen=True)
class _Course:
    """What a call needs besides tensors."""

    table: RingPlan
    lines: Lines
    local: LocalAttention
    scale: float

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `_attend`."""
        return _attend(self, q, k, v)

    def differentiate(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `_differentiate`."""
        return _differentiate(self, dout, q, k, v, out, lse)


class _Returns:
    """What was made of visiting rows, on its way to their owners.

    Args:
        likes: the tensors that return; those of wide types first.
        device: where they are.
        join: takes the rows of this rank's that something returned for, and what.
    """

    def __init__(
        self,
        course: _Course,
        likes: Sequence[Like],
        device: torch.device,
        join: Callable[[RowSelection, tuple[Tensor, ...]], None],
    ) -> None:
        self._table, self._lines = course.table, course.lines
        self._likes, self._device, self._join = likes, device, join
        self._coming: list[tuple[Handle, PackedTensors, RowSelection]] = []
        self._sends: list[Handle] = []

    def post(self, step: int, made: Sequence[Tensor]) -> None:
        """Joins what returned from the steps before, and starts the transfers of what this one made."""
        self.collect()
        for message in self._table.returns[step]:
            axis = self._lines.of(message)
            if not message.home:
                continue
            if message.source == axis.rank:
                self._sends.append(send(PackedTensors.of(*made).buffer, axis, message.to))
                continue
            choice = self._table.own[message.source].used_at_home
            parcel = PackedTensors.empty(self._likes, choice.count, self._device)
            self._coming.append((receive(parcel.buffer, axis, message.source), parcel, choice))

    def collect(self) -> None:
        """Joins everything under way."""
        for handle, parcel, choice in self._coming:
            handle.wait()
            self._join(choice, parcel.parts)
        self._coming.clear()
        finish(self._sends)


def _attend(course: _Course, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse over all ranks' keys, in lse's precision."""
    journey = RingTransfer(course.table, course.lines, (q,))
    journey.post(1)
    first, lse = course.local.forward(q, k, v, course.table.masks[0], course.scale)
    out = first.to(lse.dtype, copy=True)

    def join(choice: RowSelection, parts: tuple[Tensor, ...]) -> None:
        sums, found = parts
        there, mine = choice.take(out), choice.take(lse.transpose(1, 2)).transpose(1, 2)
        merge_(there, mine, found, sums.transpose(1, 2))
        if choice.index is not None:
            choice.put(out, there)
            choice.put(lse.transpose(1, 2), mine.transpose(1, 2))

    returns = _Returns(course, [Like.of(lse.transpose(1, 2)), Like.of(first)], q.device, join)
    for step in range(1, course.lines.along.size):
        block = journey.arrived(step)
        journey.left()
        journey.post(step + 1)
        made: tuple[Tensor, ...] = ()
        if block is not None:
            stop, (x,) = block
            keys = slice(*stop.mine)
            found, sums = course.local.forward(
                stop.used.take(x), k[:, keys], v[:, keys], course.table.masks[step], course.scale
            )
            made = sums.transpose(1, 2), found
        returns.post(step, made)
    returns.collect()
    journey.left()
    return out, lse


def _stand_in(dout: Tensor, delta: Tensor) -> Tensor:
    """An output whose product with dout (B, n, H, e) is Δ (B, n, H): kernels want the output only for that."""
    # Dividing by the largest first keeps the squares of small gradients from vanishing.
    exact = dout.to(delta.dtype)
    largest = exact.abs().amax(dim=-1, keepdim=True)
    unit = exact / largest.masked_fill(largest == 0, 1)
    squares = (unit * unit).sum(dim=-1, keepdim=True)
    return unit * (delta[..., None] / (largest * squares)).masked_fill_(largest == 0, 0)


def _differentiate(
    course: _Course, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in lse's precision."""
    home = lse.transpose(1, 2), row_sums(dout, out).transpose(1, 2), q, dout
    journey = RingTransfer(course.table, course.lines, home)
    journey.post(1)
    dq, dk, dv = to_be_summed(course.local.backward(dout, q, k, v, out, lse, course.table.masks[0], course.scale), lse)

    def join(choice: RowSelection, parts: tuple[Tensor, ...]) -> None:
        choice.put(dq, parts[0], add=True)

    returns = _Returns(course, [Like.of(dq)], q.device, join)
    for step in range(1, course.lines.along.size):
        block = journey.arrived(step)
        journey.left()
        journey.post(step + 1)
        made: tuple[Tensor, ...] = ()
        if block is not None:
            stop, parts = block
            keys = slice(*stop.mine)
            sums, delta, x, theirs = (stop.used.take(part) for part in parts)
            if stop.used.padding is not None:
                # The probabilities of what only fills up are 0 then.
                sums = sums.masked_fill(stop.used.once(upload, stop.used.padding, sums.device)[..., None], float("inf"))
            y = _stand_in(theirs, delta).to(x.dtype)
            made_of = course.local.backward(
                theirs, x, k[:, keys], v[:, keys], y, sums.transpose(1, 2), course.table.masks[step], course.scale
            )
            dx, dkeys, dvalues = to_be_summed(made_of, sums)
            dk[:, keys] += dkeys
            dv[:, keys] += dvalues
            made = (dx,)
        returns.post(step, made)
    returns.collect()
    journey.left()
    return dq, dk, dv
