"""What a rank is compared with: its peers' median, and what their work explains. No torch."""

from __future__ import annotations

import numpy as np


def median_of_others(values: np.ndarray) -> np.ndarray:
    """(…, ranks) → of the same shape: for each rank the median of all others. At least 2 ranks.

    From one sorting: leaving one out moves the middle by at most a place.
    """
    count = values.shape[-1]
    if count == 2:
        return values[..., ::-1].copy()
    order = np.argsort(values, -1)
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.broadcast_to(np.arange(count), order.shape), -1)
    ranked = np.take_along_axis(values, order, -1)

    def kept(at: int) -> np.ndarray:
        """What stands at a place once the rank's own value is taken out."""
        return np.where(place > at, ranked[..., at : at + 1], ranked[..., at + 1 : at + 2])

    middle = (count - 1) // 2
    return kept(middle) if count % 2 == 0 else (kept(middle - 1) + kept(middle)) / 2


def share_by_work(own: np.ndarray, work: np.ndarray, roles: np.ndarray, without: int | None = None) -> float:
    """How much of the ranks' own time follows the work that they are given, from 0 to 1: the β of

        own = c · speed of the rank · (1 + β · (work − 1)).

    Time that is all matrix products has 1; small experts, launches and the interpreter take as long for less work. It
    is the weighted median of what every rank says in every step, compared with its role's median in the same step, so
    that neither a slow rank nor a slow step moves it. 1 where all have the same work.

    Args:
        own, work: (steps, ranks), each rank's own seconds and its work over the mean of its role.
        roles: (ranks,) the same number for ranks that do the same.
        without: a rank that is suspected, and so says nothing.
    """
    found, weights = [], []
    for role in np.unique(roles):
        ranks = np.flatnonzero(roles == role)
        if len(ranks) < 2:
            continue
        heard = ranks != without
        ratio = own[:, ranks] / np.maximum(np.median(own[:, ranks], 1, keepdims=True), 1e-12)
        usual = np.median(work[:, ranks], 1, keepdims=True)
        weight = ((work[:, ranks] - 1) - ratio * (usual - 1))[:, heard].ravel()
        found.append((ratio - 1)[:, heard].ravel())
        weights.append(weight)
    if not found:
        return 1.0
    excess, weight = np.concatenate(found), np.concatenate(weights)
    told = np.abs(weight) > 1e-9
    if not told.any():
        return 1.0
    slopes, weight = excess[told] / weight[told], np.abs(weight[told])
    order = np.argsort(slopes)
    at = np.searchsorted(np.cumsum(weight[order]), weight.sum() / 2)
    return float(np.clip(slopes[order][min(at, len(order) - 1)], 0.0, 1.0))
