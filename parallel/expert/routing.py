"""What a router decided, in the words that routers, dispatchers and experts share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .plan import Assignments, RowPlan


@dataclass
class DeepEpLayout:
    """What DeepEP's kernels found out about a routing.

    Args:
        handle: theirs.
        ids, weights: (m, K) of the tokens that came, with ids of this rank's experts or -1.
        counts: rows of each expert.
        plan: of these rows; none: not made yet.
    """

    handle: Any
    ids: Tensor
    weights: Tensor
    counts: list[int]
    plan: RowPlan | None = None


@dataclass
class Findings:
    """What dispatchers found out about the experts of a routing, each for itself.

    Args:
        plans: of the all-to-all, by its number of chunks.
        mine: of the all-gather.
        deepep: of DeepEP.
    """

    plans: dict[int, RowPlan] = field(default_factory=dict)
    mine: Assignments | None = None
    deepep: DeepEpLayout | None = None


@dataclass(frozen=True)
class Routing:
    """Where each of n tokens goes: to at most K experts.

    Args:
        experts: (n, K) ids of experts; -1: nowhere (a null expert, or dropped).
        weights: (n, K) factors of the experts' outputs, with their gradient; 0 where the id is -1.
        capacity: rows that every expert gets from this device where shapes are fixed (`moe.pad`), else none.
        findings: about `experts`; the same object when a layer runs again for its backward.
    """

    experts: Tensor
    weights: Tensor
    capacity: int | None = None
    findings: Findings = field(default_factory=Findings)


@dataclass(frozen=True)
class RouteForm:
    """How weights follow from logits, and what the losses are multiplied by.

    Args:
        softmax: scores are a softmax of the logits, else sigmoids.
        normalize: the weights of a token sum to 1, before the scale.
        scale: of the weights.
        aux: factor of Σ shares · loads over the tokens; 0: no balancing loss.
        z: factor of Σ (log-sum-exp)².
    """

    softmax: bool
    normalize: bool
    scale: float
    aux: float = 0.0
    z: float = 0.0
