"""Bytes that a rank sends for data parallelism, by closed form. No torch.

Of a bucket of N elements, gradients of g bytes and parameters of w, over R ranks: parameters are spread over W,
gradients over G, states over O, of which there are C = R / O copies, and a step has m microbatches and n gathers:

    W ranks     n (W − 1)/W · N w           all-gather of parameters, before their stage's passes (W > 1)
    G ranks     m (G − 1)/G · N g           reduce-scatter of each microbatch's gradients (G > 1)
    O / G       (O/G − 1)/(O/G) · N/G · g   reduce-scatter of what they have summed (G = 1: of the step's gradients)
    C copies    2 (C − 1)/C · N/O · g       all-reduce of the share
    O / W       (O/W − 1)/(O/W) · N/W · w   all-gather of a part of the parameters (W = 1: of all)

Ranks of a ring send so much; between the processes of a host each reads as much from the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .fixed import FlatBucket


@dataclass(frozen=True)
class ReplicaTraffic:
    """Bytes that a rank sends in a step.

    Args:
        params: among the ranks over which parameters are spread, every gather.
        grads: among those over which gradients are, every microbatch.
        neighbours: among those over which states are.
        copies: between those that hold the same share.
    """

    params: float
    grads: float
    neighbours: float
    copies: float


def replica_traffic(
    buckets: Iterable[FlatBucket],
    gradient: int,
    parameter: int,
    microbatches: int = 1,
    gathers: Mapping[int, int] | None = None,
) -> ReplicaTraffic:
    """Of a rank's flat buckets; `gradient` and `parameter`: bytes of an element, `gathers`: of each stage in a step,
    none: two a microbatch."""
    params = grads = neighbours = copies = 0.0
    for bucket in buckets:
        over, spread = bucket.elements // bucket.share, bucket.elements // bucket.kept
        count, between = bucket.replicas // over, over // spread
        grads += microbatches * _part(spread) * bucket.elements * gradient
        wide, stage = bucket.elements // bucket.part, bucket.kind[-1]
        times = 2 * microbatches if gathers is None else gathers.get(stage, 0)
        params += times * _part(wide) * bucket.elements * parameter
        neighbours += _part(between) * bucket.kept * gradient + _part(over // wide) * bucket.part * parameter
        copies += 2 * _part(count) * bucket.share * gradient
    return ReplicaTraffic(params, grads, neighbours, copies)


def _part(ranks: int) -> float:
    """Of what so many ranks reduce or gather, what each of them sends."""
    return (ranks - 1) / ranks
