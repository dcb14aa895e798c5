"""The parameters of one bucket on a rank: whole all the time, or a part of them, and the whole when it is wanted."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..comm.collectives import Handle, all_gather
from .spread import SpreadAxes

_PART = "part"
"""The attribute of a parameter that is spread; nothing else reads or writes it."""


def give_part(param: Tensor, part: Tensor) -> None:
    """What the rank holds all the time of a parameter whose whole comes and goes."""
    setattr(param, _PART, part)


def part_of(param: Tensor) -> Tensor:
    """What the rank holds all the time of a parameter (…): all of it, or a flat part (n,)."""
    found = getattr(param, _PART, param)
    assert isinstance(found, Tensor)
    return found


class BucketParameters(Protocol):
    """The parameters of one bucket."""

    flat: Tensor
    """(size,) of which parameters are views; it may have no memory."""
    held: Tensor
    """What there is all the time: (n,), elements [first, first + n) of `flat`."""
    first: int

    def gather(self, owned: Tensor) -> Handle | None:
        """Hands this rank's updated share (n,) to those who hold it besides; none: nobody does."""
        ...

    def collect(self) -> None:
        """Starts making them whole."""
        ...

    def have(self) -> None:
        """Returns when they are whole.

        Raises:
            RuntimeError: nobody has asked for that.
        """
        ...

    def drop(self) -> None:
        """Gives the memory of the whole back."""
        ...

    def forget(self) -> None:
        """As `drop`, after a step that was left half-way: waits for nobody."""
        ...


class WholeParameters:
    """Parameters that every rank has.

    Args:
        held: (size,), their memory.
        axes: over which states are spread.
    """

    def __init__(self, held: Tensor, axes: SpreadAxes) -> None:
        self.flat = self.held = held
        self.first, self._axis = 0, axes.states

    def gather(self, owned: Tensor) -> Handle | None:
        return all_gather(owned, self._axis, out=self.flat) if self._axis.size > 1 else None

    def collect(self) -> None: ...
    def have(self) -> None: ...
    def drop(self) -> None: ...
    def forget(self) -> None: ...


class SpreadParameters:
    """Parameters of which every rank of an axis has an equal part.

    The storage of the whole stays the same object, which has memory from `collect` to `drop` only: parameters, and what
    autograd has saved of them, are views of it, and see the values again that they saw before. New views can be made
    only while it has memory, as until the first `drop`.

    Args:
        held: (n,), the memory of this rank's part.
        axes: over which parameters are spread.
    """

    def __init__(self, held: Tensor, axes: SpreadAxes) -> None:
        self.held, self._axes = held, axes
        self.first = axes.params.rank * len(held)
        self.flat = torch.empty(len(held) * axes.params.size, dtype=held.dtype, device=held.device)
        self._storage = self.flat.untyped_storage()
        self._nbytes = self._storage.nbytes()
        self._collecting: Handle | None = None

    def gather(self, owned: Tensor) -> Handle | None:
        return all_gather(owned, self._axes.holders, out=self.held) if self._axes.holders.size > 1 else None

    @torch.no_grad()
    def collect(self) -> None:
        self._storage.resize_(self._nbytes)
        self._collecting = all_gather(self.held, self._axes.params, out=self.flat)

    def have(self) -> None:
        if self._collecting is None:
            raise RuntimeError("parameters are read that the program has not gathered")
        self._collecting.wait()

    def drop(self) -> None:
        if self._collecting is not None:
            self._collecting.wait()  # whoever writes into the memory is to be done with it
            self._collecting = None
        self._storage.resize_(0)

    def forget(self) -> None:
        under_way, self._collecting = self._collecting, None
        if under_way is None or under_way.done():
            self._storage.resize_(0)
        # Else whoever still writes into it may do so until the session ends, and the memory with it.
