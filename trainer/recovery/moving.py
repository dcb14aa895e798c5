"""Pieces of states on their way between ranks, when a mesh is made anew."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...parallel.comm.collectives import receive, send
from ...parallel.comm.mesh import Axis
from .copy_file import NoSnapshot

_CHECK = 8
"""Bytes of the checksum behind a parcel."""


def exchange(axis: Axis, out: Mapping[int, Sequence[Tensor]], into: Mapping[int, Sequence[Tensor]]) -> None:
    """Sends tensors to ranks of an axis and fills tensors with what comes from there; both ends know the same.

    Args:
        axis: all of whose ranks call it.
        out: for each index on the axis what goes there.
        into: what comes from there, to be filled.

    Raises:
        NoSnapshot: other bytes have come than were sent.
        Aborted, Overdue, PeerGone: see `Abort.wait`.
    """
    parcels = {peer: _packed(out[peer]) for peer in sorted(out) if out[peer]}
    coming = {
        peer: torch.empty(sum(each.nbytes for each in into[peer]) + _CHECK, dtype=torch.uint8)
        for peer in sorted(into)
        if into[peer]
    }
    flights = [receive(parcel, axis, peer) for peer, parcel in coming.items()]
    flights += [send(parcel, axis, peer) for peer, parcel in parcels.items()]
    for flight in flights:
        flight.wait()
    for peer, parcel in coming.items():
        if not torch.equal(parcel[-_CHECK:], _checksum(parcel[:-_CHECK])):
            raise NoSnapshot(f"pieces came damaged from rank {peer}")
        _unpack(parcel, into[peer])


def _packed(tensors: Sequence[Tensor]) -> Tensor:
    body = torch.cat([each.contiguous().view(-1).view(torch.uint8) for each in tensors])
    return torch.cat((body, _checksum(body)))


def _checksum(body: Tensor) -> Tensor:
    return torch.tensor([zlib.crc32(body.numpy().data)]).view(torch.uint8)


def _unpack(parcel: Tensor, tensors: Sequence[Tensor]) -> None:
    at = 0
    for each in tensors:
        mine = parcel[at : at + each.nbytes].clone()  # a view of another type needs memory that begins where it may
        each.copy_(mine.view(each.dtype).view(each.shape))
        at += each.nbytes
