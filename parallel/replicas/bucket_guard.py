"""Checksums of a bucket's memory in the times in which nobody may change it."""

from __future__ import annotations

from collections.abc import Iterator

from ..checksum import ChecksumWindow, ParameterMemory
from .buckets import Bucket, Member


class BucketGuard:
    """The windows of one bucket, as its `BucketEvents` and the step open and check them.

        gradients   each from its last addition to the moment when the bucket is handed to the collective
        own         from the end of an update to the beginning of the next one
        others      of spread states: the other ranks' shares, from when they are here to the beginning of the next one

    Args:
        bucket: which; its parameters are already in place.
    """

    def __init__(self, bucket: Bucket) -> None:
        device = bucket.flat.device
        pairs = zip(bucket.members, bucket.slots, strict=True)
        self.gradients = ChecksumWindow([ParameterMemory("gradient", m.name, slot.buffer) for m, slot in pairs], device)
        own, others = (list(_parameters(bucket, mine=mine)) for mine in (True, False))
        self.own, self.others = ChecksumWindow(own, device), ChecksumWindow(others, device)

    def start_step(self) -> None:
        """New gradients come."""
        self.gradients.close()

    def final(self, number: int) -> None:
        """The last gradient of a parameter has been added."""
        self.gradients.open(number)

    def handed_over(self) -> None:
        """The gradients are about to be handed to the collective, which changes them."""
        self.gradients.check()
        self.gradients.close()

    def gathered(self) -> None:
        """The other ranks' shares are here."""
        self.others.open()


def _parameters(bucket: Bucket, *, mine: bool) -> Iterator[ParameterMemory]:
    """The parts of parameters that this rank updates, or that it is given."""
    for member in bucket.members:
        for low, high in _spans(bucket, member, mine=mine):
            if low < high:
                yield ParameterMemory("parameter", member.name, bucket.flat[low:high])


def _spans(bucket: Bucket, member: Member, *, mine: bool) -> list[tuple[int, int]]:
    if mine:
        return [(max(member.start, bucket.start), min(member.stop, bucket.stop))]
    before = member.start, min(member.stop, bucket.start)
    return [before, (max(member.start, bucket.stop), member.stop)]
