"""Which ranks of a job stand together along an axis, and which do the same work. No torch here."""

from __future__ import annotations

import numpy as np

from ....configs.schema import Config
from ....parallel.record.parts import TimePart


def grid(cfg: Config) -> np.ndarray:
    """(pp, dp, cp, tp) ranks of a resolved job."""
    p = cfg.parallel
    return np.arange(p.ranks).reshape(p.pp, -1, p.cp, p.tp)


def expert_grid(cfg: Config) -> np.ndarray:
    """(pp, edp, ep, etp) ranks of a resolved job."""
    p = cfg.parallel
    return np.arange(p.ranks).reshape(p.pp, -1, p.ep, p.etp)


def lines(cfg: Config, part: TimePart) -> np.ndarray:
    """(lines, ranks) that communicate with each other in a part of the step's communication.

    Args:
        cfg: resolved.
        part: one of `parts.AXES`.
    """
    ranks = grid(cfg)
    pp, dp, cp, tp = ranks.shape
    if part == TimePart.EP:
        experts = expert_grid(cfg)
        return experts.reshape(pp * experts.shape[1], -1)
    orders = {
        TimePart.TP: ((0, 1, 2, 3), tp),
        TimePart.CP: ((0, 1, 3, 2), cp),
        TimePart.DP: ((0, 3, 1, 2), dp * cp),
        TimePart.PP: ((1, 2, 3, 0), pp),
        TimePart.VOCABULARY: ((1, 2, 0, 3), pp * tp),
    }
    order, size = orders[part]
    return ranks.transpose(order).reshape(-1, size)
