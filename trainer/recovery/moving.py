"""Copies on their way to a rank of another node, when a mesh is made anew."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch

from ...parallel.comm.collectives import receive, send
from ...parallel.comm.mesh import Axis
from .copy_file import NoSnapshot, Seal, WholeCopy
from .point import RunPoint


def hand_over(copy: WholeCopy, axis: Axis, to: int) -> None:
    """Sends a copy to the rank at index `to` of an axis, which calls `take_over`."""
    sizes = torch.tensor([len(copy.index), len(copy.state), *copy.seal.words])
    for part in (sizes, *(torch.frombuffer(bytearray(each), dtype=torch.uint8) for each in (copy.index, copy.state))):
        send(part, axis, to).wait()


def take_over(point: RunPoint, axis: Axis, source: int) -> WholeCopy:
    """The copy that the rank at index `source` sends.

    Args:
        point: how far its state is.
        axis: over which it comes.
        source: from where.

    Raises:
        NoSnapshot: other bytes have come than were copied.
    """
    sizes = receive(torch.zeros(10, dtype=torch.int64), axis, source).wait().tolist()
    index = receive(torch.empty(sizes[0], dtype=torch.uint8), axis, source).wait()
    state = receive(torch.empty(sizes[1], dtype=torch.uint8), axis, source).wait()
    seal, found = Seal(*sizes[2:-1]), memoryview(bytearray(state.numpy().tobytes()))
    if zlib.crc32(found) != seal.state_crc:
        raise NoSnapshot(f"the copy of slot {seal.slot} came damaged from rank {source}")
    return WholeCopy(Path(f"of rank {source}"), seal, point, index.numpy().tobytes(), found)
