"""Bytes that a rank sends for data parallelism, by closed form. No torch.

Of a bucket of N elements, gradients of g bytes and parameters of w, over R ranks: gradients are spread over G, states
over O, of which there are C = R / O copies, and a step has m microbatches:

    G ranks     m (G − 1)/G · N g           reduce-scatter of each microbatch's gradients (G > 1)
    O / G       (O/G − 1)/(O/G) · N/G · g   reduce-scatter of what they have summed (G = 1: of the step's gradients)
    C copies    2 (C − 1)/C · N/O · g       all-reduce of the share
    O ranks     (O − 1)/O · N w             all-gather of parameters

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
        grads: among the ranks over which gradients are spread, every microbatch.
        neighbours: among those over which states are.
        copies: between those that hold the same share.
    """

    grads: float
    neighbours: float
    copies: float


def replica_traffic(
    buckets: Iterable[FlatBucket], gradient: int, parameter: int, microbatches: int = 1
) -> ReplicaTraffic:
    """Of a rank's flat buckets; `gradient` and `parameter`: bytes of an element."""
    grads = neighbours = copies = 0.0
    for bucket in buckets:
        over, spread = bucket.elements // bucket.share, bucket.elements // bucket.kept
        count, between = bucket.replicas // over, over // spread
        grads += microbatches * _part(spread) * bucket.elements * gradient
        neighbours += _part(between) * bucket.kept * gradient + _part(over) * bucket.elements * parameter
        copies += 2 * _part(count) * bucket.share * gradient
    return ReplicaTraffic(grads, neighbours, copies)


def _part(ranks: int) -> float:
    """Of what so many ranks reduce or gather, what each of them sends."""
    return (ranks - 1) / ranks
