"""Bytes that a rank sends for data parallelism, by closed form. No torch.

Of a bucket of N elements, gradients of g bytes and parameters of w, states spread over O of R ranks, C = R / O copies:

    over the O ranks     (O − 1)/O · N · (g + w)        reduce-scatter of gradients, all-gather of parameters
    over the C copies    2 (C − 1)/C · N/O · g          all-reduce of the share

Ranks of a ring send so much; between the processes of a host each reads as much from the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .fixed import FlatBucket


@dataclass(frozen=True)
class ReplicaTraffic:
    """Bytes that a rank sends in a step.

    Args:
        neighbours: among the ranks over which states are spread.
        copies: between those that hold the same share.
    """

    neighbours: float
    copies: float


def replica_traffic(buckets: Iterable[FlatBucket], gradient: int, parameter: int) -> ReplicaTraffic:
    """Of a rank's flat buckets; `gradient` and `parameter`: bytes of an element."""
    neighbours = copies = 0.0
    for bucket in buckets:
        over = bucket.elements // bucket.share
        count = bucket.replicas // over
        neighbours += (over - 1) / over * bucket.elements * (gradient + parameter)
        copies += 2 * (count - 1) / count * bucket.share * gradient
    return ReplicaTraffic(neighbours, copies)
