"""Whether replicas can be spread as `parallel.data` says."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import Problem
from ..reading.spread import is_flat
from ..schema import Config

_SECTION = "parallel.data"
_PER_NODE = "hardware.ranks_per_node"


def validate_spread(config: Config) -> list[Problem]:
    """Every problem that follows from the values alone."""
    if not is_flat(config) or config.parallel.dp is None or config.parallel.dp * config.parallel.cp < 1:
        return []
    return [*_divisors(config), *_node(config)]


def _divisors(config: Config) -> Iterator[Problem]:
    p = config.parallel
    replicas, wanted = p.dp * p.cp, p.data.states
    if not isinstance(wanted, int) or (wanted >= 1 and replicas % wanted == 0):
        return
    near = max(size for size in range(1, replicas + 1) if replicas % size == 0 and size <= max(1, wanted))
    message = (
        f"{wanted} does not divide parallel.dp={p.dp} x parallel.cp={p.cp} = {replicas}, the ranks that hold the same "
        f"parameters; set {_SECTION}.states={near}"
    )
    yield Problem(f"{_SECTION}.states", message, ("parallel.dp", "parallel.cp"))


def _node(config: Config) -> Iterator[Problem]:
    per_node, tp = config.hardware.ranks_per_node, config.parallel.tp
    if config.parallel.data.states != "node":
        return
    if per_node is None:
        message = f"node: nobody knows how many ranks a node has; set {_PER_NODE}"
        yield Problem(f"{_SECTION}.states", message, (_PER_NODE,))
    elif per_node >= 1 and tp >= 1 and per_node % tp:
        message = (
            f"node: {_PER_NODE}={per_node} is no multiple of parallel.tp={tp}, so that ranks with the same parameters "
            f"stand in other places on each node; set {_SECTION}.states to a number of ranks"
        )
        yield Problem(f"{_SECTION}.states", message, (_PER_NODE, "parallel.tp"))
