"""Rows on their way round a ring, as one rank sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..comm.collectives import Handle, receive, send
from ..comm.mesh import Axis
from .packed_tensors import Like, PackedTensors
from .ring_plan import Message, RingPlan, Stop


@dataclass(frozen=True)
class Lines:
    """What carries the messages of one direction.

    Args:
        along: for transfers in the direction.
        against: for returns the other way.
        sign: +1 toward higher ranks, −1 toward lower ones.
    """

    along: Axis
    against: Axis
    sign: int

    def of(self, message: Message) -> Axis:
        """The axis for a message."""
        neighbours = (message.source + self.sign) % self.along.size == message.to
        return self.along if neighbours or not message.home else self.against


class RingTransfer:
    """All ranks' rows under way. While a rank works on those of one step, those of the next arrive.

    Args:
        table: when which rows go where.
        lines: which axes they take.
        home: (B, n, …) what goes round of this rank's own rows; tensors of wide types first.
    """

    def __init__(self, table: RingPlan, lines: Lines, home: Sequence[Tensor]) -> None:
        self._table, self._lines, self._home = table, lines, home
        self._held: dict[int, PackedTensors] = {}
        self._arriving: Handle | None = None
        self._sends: list[Handle] = []

    def post(self, step: int) -> None:
        """Starts the transfers of the rows that the step works on."""
        if step >= len(self._table.moves):
            return
        for message in self._table.moves[step]:
            axis = self._lines.of(message)
            if message.to == axis.rank:
                parcel = empty_like(self._home, self._table.at(message.owner).rows.count)
                self._held[message.owner] = parcel
                self._arriving = receive(parcel.buffer, axis, message.source)
            else:
                self._sends.append(send(self._outgoing(message.owner, axis.rank), axis, message.to))

    def _outgoing(self, owner: int, rank: int) -> Tensor:
        if owner == rank:
            carried = min(self._table.own.values(), key=lambda stop: stop.step).carried
            return PackedTensors.of(*(carried.take(x) for x in self._home)).buffer
        stop = self._table.at(owner)
        parcel = self._held.pop(owner)
        if stop.onward is None or (stop.onward.index is None and stop.onward.count == stop.rows.count):
            return parcel.buffer
        return PackedTensors.of(*(stop.onward.take(x) for x in parcel.parts)).buffer

    def arrived(self, step: int) -> tuple[Stop, tuple[Tensor, ...]] | None:
        """The rows of the step, complete, if there are any."""
        stop = self._table.stops[step]
        if stop is None or self._arriving is None:
            return None
        self._arriving.wait()
        self._arriving = None
        parcel = self._held[stop.owner]
        if stop.following is None:
            del self._held[stop.owner]
        return stop, parcel.parts

    def left(self) -> None:
        """Waits until everything sent so far has left."""
        finish(self._sends)


def empty_like(tensors: Sequence[Tensor], count: int) -> PackedTensors:
    """For `count` rows of tensors (B, n, …)."""
    return PackedTensors.empty([Like.of(x) for x in tensors], count, tensors[0].device)


def finish(handles: list[Handle]) -> None:
    """Waits for all, and forgets them."""
    for handle in handles:
        handle.wait()
    handles.clear()
