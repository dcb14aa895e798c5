"""Ring attention: queries stay, keys and values go round (Ring Attention, arXiv 2310.01889).

Each rank attends to its own keys first, then to those of the others as they pass by, and merges what each gave. While
it works on one block the next one arrives. Keys travel toward lower ranks, so with zigzag dealing-out the back half of
a block is of no use to anybody after the wrap-around and is left behind there: a quarter of the volume is saved. Toward
higher ranks that is impossible.

    P = 4, the keys of rank 2     2 ──all──▶ 1 ──all──▶ 0 ──front half──▶ 3

In backward the keys make the same journey; their gradients follow a step behind, gather each rank's part and return to
their owner as soon as they are complete. Only the rank's own q, k, v, out and log-sum-exp are kept in between.

Both directions (duplex): half of the key-value heads travel toward higher ranks, as a ring of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from ...configs.errors import Problem, UserError
from ...configs.schema_parallel import ContextConfig
from ..comm.collectives import Handle, receive, send
from ..comm.mesh import Axis, Mesh
from ..kernels.attention import differentiable
from ..kernels.interfaces import AttentionCall, LocalAttention, to_be_summed
from ..kernels.merge import merge_
from ..kernels.precision import precise
from .packed_tensors import PackedTensors
from .ring_plan import RingPlan, RingPlans, Stop
from .ring_transfer import Lines, RingTransfer, empty_like, finish


class Ring:
    """A `Core` in which keys and values go round. One serves all layers of a rank.

    Args:
        axis: the ranks, for what travels toward lower ones.
        back: the same ranks, for what travels toward higher ones or returns; on NCCL a communicator of its own.
        local: attention to one block.
        duplex: whether half of the key-value heads travel the other way.
    """

    def __init__(self, axis: Axis, back: Axis, local: LocalAttention, duplex: bool = False) -> None:
        self._local = local
        self._down = RingPlans(down=True, keys=True)
        self._up = RingPlans(down=False, keys=True) if duplex else None
        self._axis, self._back = axis, back

    @staticmethod
    def of(context: ContextConfig, mesh: Mesh, local: LocalAttention) -> Ring:
        """The core of a job; arguments as of `make_core`."""
        return Ring(mesh.axis("cp"), mesh.axis("cp_back"), local, duplex=context.duplex)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        """See `Core`.

        Raises:
            UserError: duplex with one key-value head.
        """
        return differentiable(q, k, v, call.sinks, _BothWays(self._courses(k.shape[2], call)))

    def _courses(self, heads: int, call: AttentionCall) -> list[_Direction]:
        layout, window, scale = call.layout, call.window, call.scale
        down = Lines(self._axis, self._back, -1)
        if self._up is None or self._axis.size == 1:
            return [_Direction(self._down.of(layout, window), self._local, scale, down, slice(0, heads))]
        if heads == 1:
            raise UserError(
                Problem(
                    "parallel.context.duplex",
                    "the two directions share the key-value heads, and a rank has 1 of them; "
                    "set parallel.context.duplex to false",
                )
            )
        half, up = (heads + 1) // 2, Lines(self._back, self._axis, 1)
        return [
            _Direction(self._down.of(layout, window), self._local, scale, down, slice(0, half)),
            _Direction(self._up.of(layout, window), self._local, scale, up, slice(half, heads)),
        ]


@dataclass(frozen=True)
class _Direction:
    """One direction.

    Args:
        table: when what goes where.
        local, scale: as of the method.
        lines: which axes it takes.
        heads: the key-value heads that travel so.
    """

    table: RingPlan
    local: LocalAttention
    scale: float
    lines: Lines
    heads: slice

    def queries(self, x: Tensor, groups: int) -> Tensor:
        """The query heads of (B, n, H, ·), of which `groups` share a key-value head."""
        return x[:, :, self.heads.start * groups : self.heads.stop * groups]

    def sums(self, lse: Tensor, groups: int) -> Tensor:
        """The query heads of (B, H, n)."""
        return lse[:, self.heads.start * groups : self.heads.stop * groups]


def _attend(course: _Direction, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Iterator[None]:
    """Fills out and lse; yields between starting transfers and working, so that two directions can take turns."""
    journey = RingTransfer(course.table, course.lines, (k, v))
    journey.post(1)
    yield
    own_out, own_lse = course.local.forward(q, k, v, course.table.masks[0], course.scale)
    out.copy_(own_out)
    lse.copy_(own_lse)
    del own_out, own_lse
    yield
    for step in range(1, course.lines.along.size):
        block = journey.arrived(step)
        journey.left()
        journey.post(step + 1)
        yield
        if block is not None:
            stop, (keys, values) = block
            rows = slice(*stop.mine)
            found = course.local.forward(q[:, rows], keys, values, course.table.masks[step], course.scale)
            merge_(out[:, rows], lse[:, :, rows], *found)
            del keys, values, found
        del block  # not to be held while the next one but one arrives
        yield
    journey.left()


class _Gradients:
    """The gradients of keys and values under way: a step behind the keys, then home."""

    def __init__(self, course: _Direction, dk: Tensor, dv: Tensor) -> None:
        self._course, self._home = course, (dk, dv)
        self._coming: dict[int, tuple[Handle, PackedTensors]] = {}
        self._returning: list[tuple[Handle, PackedTensors, Stop]] = []
        self._sends: list[Handle] = []

    def post(self, step: int, made: Sequence[Tensor]) -> None:
        """Adds what the step made to what came with its keys, and starts the transfers of what the ranks have."""
        table = self._course.table
        stop = table.stops[step]
        if stop is not None and stop.owner in self._coming:
            handle, parcel = self._coming.pop(stop.owner)
            handle.wait()
            made = [x.add_(part) for x, part in zip(parcel.parts, made, strict=True)]
        self.left()
        for message in table.returns[step]:
            axis = self._course.lines.of(message)
            if message.source == axis.rank:
                assert stop is not None
                choice = stop.complete if message.home else stop.onward
                if choice is not None:
                    parcel = PackedTensors.of(*(choice.take(x) for x in made))
                    self._sends.append(send(parcel.buffer, axis, message.to))
            elif message.home:
                origin = table.own[message.source]
                if origin.complete_at_home is not None:
                    parcel = empty_like(self._home, origin.complete_at_home.count)
                    self._returning.append((receive(parcel.buffer, axis, message.source), parcel, origin))
            else:
                parcel = empty_like(self._home, table.at(message.owner).rows.count)
                self._coming[message.owner] = receive(parcel.buffer, axis, message.source), parcel

    def left(self) -> None:
        """Waits until everything sent so far has left."""
        finish(self._sends)

    def collect(self) -> None:
        """Adds what returned to this rank's own."""
        for handle, parcel, stop in self._returning:
            handle.wait()
            assert stop.complete_at_home is not None
            for x, part in zip(self._home, parcel.parts, strict=True):
                stop.complete_at_home.put(x, part, add=True)
        self.left()


@dataclass(frozen=True)
class _Saved:
    """One direction's part of what backward works on."""

    dout: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor


def _differentiate(course: _Direction, saved: _Saved, dq: Tensor, dk: Tensor, dv: Tensor) -> Iterator[None]:
    """Fills the gradients; yields as `_attend`."""
    journey = RingTransfer(course.table, course.lines, (saved.k, saved.v))
    gradients = _Gradients(course, dk, dv)
    journey.post(1)
    yield
    mask = course.table.masks[0]
    own = course.local.backward(saved.dout, saved.q, saved.k, saved.v, saved.out, saved.lse, mask, course.scale)
    for whole, mine in zip((dq, dk, dv), own, strict=True):
        whole.copy_(mine)
    del own, mine
    yield
    for step in range(1, course.lines.along.size):
        block = journey.arrived(step)
        journey.left()
        journey.post(step + 1)
        yield
        made: list[Tensor] = []
        if block is not None:
            stop, (keys, values) = block
            rows = slice(*stop.mine)
            x, theirs, y, sums = saved.q[:, rows], saved.dout[:, rows], saved.out[:, rows], saved.lse[:, :, rows]
            mask = course.table.masks[step]
            grads = course.local.backward(theirs, x, keys, values, y, sums, mask, course.scale)
            part, *made = to_be_summed(grads, sums)
            dq[:, rows] += part
            del keys, values, part, grads
        del block
        gradients.post(step, made)
        del made
        yield
    gradients.collect()
    journey.left()


@dataclass(frozen=True)
class _BothWays:
    """One call: the directions take turns, so that each computes while the other communicates."""

    courses: list[_Direction]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """out and lse over all ranks' keys, in lse's precision."""
        groups = q.shape[2] // k.shape[2]
        out = q.new_empty(*q.shape[:3], v.shape[-1], dtype=precise(q.dtype))
        lse = out.new_empty(q.shape[0], q.shape[2], q.shape[1])
        runs = [
            _attend(
                course,
                course.queries(q, groups),
                k[:, :, course.heads],
                v[:, :, course.heads],
                course.queries(out, groups),
                course.sums(lse, groups),
            )
            for course in self.courses
        ]
        for _ in zip_longest(*runs):
            pass
        return out, lse

    def differentiate(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv in lse's precision."""
        groups = q.shape[2] // k.shape[2]
        dq, dk, dv = (torch.empty_like(x, dtype=lse.dtype) for x in (q, k, v))
        runs = []
        for course in self.courses:
            theirs, x, y, wanted = (course.queries(each, groups) for each in (dout, q, out, dq))
            keys, values, dkeys, dvalues = (each[:, :, course.heads] for each in (k, v, dk, dv))
            saved = _Saved(theirs, x, keys, values, y, course.sums(lse, groups))
            runs.append(_differentiate(course, saved, wanted, dkeys, dvalues))
        for _ in zip_longest(*runs):
            pass
        return dq, dk, dv
