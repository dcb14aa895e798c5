"""Over how many ranks data parallelism spreads what belongs to a parameter: the points of one space.

`parallel.data.sharding` names points of it, and the keys beside it set single degrees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..schema import Config

SpreadOver = int | Literal["node", "all"]
"""So many ranks, those of one node, or all that hold the same parameters."""
_NAMED: dict[str, tuple[SpreadOver, SpreadOver, SpreadOver]] = {
    "ddp": (1, 1, 1),
    "zero1": (1, 1, "all"),
    "zero2": (1, "all", "all"),
    "fsdp": ("all", "all", "all"),
    "hsdp": ("node", "node", "node"),
}
"""Points of the space: what parameters, gradients and states are spread over."""


@dataclass(frozen=True)
class SpreadDegrees:
    """Over how many neighbours of the ranks that hold the same parameters (of dp · cp; experts: of edp) each kind of
    memory is spread; 1: every rank has all of it.

    Args:
        replicas: how many hold the same parameters; a multiple of each degree.
        params: parameters of layers, between their stage's passes.
        grads: gradient sums, from one microbatch to the next; a multiple of `params`.
        states: masters and moments; a multiple of `grads`.
    """

    replicas: int
    params: int
    grads: int
    states: int

    @property
    def copies(self) -> int:
        """Ranks that hold the same share of the states."""
        return self.replicas // self.states


def is_flat(config: Config) -> bool:
    """Whether parameters lie in flat buckets of our own, which is where degrees can be set."""
    return config.parallel.data.sharding in _NAMED


def dense_spread(config: Config) -> SpreadDegrees:
    """Of all parameters but those of routed experts."""
    data = config.parallel.data
    own = (data.params, data.grads, data.states)
    named = _NAMED.get(data.sharding, (1, 1, 1))
    degrees = (over(config, name if set_ is None else set_) for set_, name in zip(own, named, strict=True))
    return SpreadDegrees(config.parallel.dp * config.parallel.cp, *degrees)


def expert_spread(config: Config) -> SpreadDegrees:
    """Of routed experts. There are as many copies of their states as of all others, as far as edp allows: those of one
    group then stand among the same ranks. So with their gradients."""
    dense, replicas = dense_spread(config), expert_replicas(config)

    def like(degree: int) -> int:
        return 1 if degree == 1 else replicas // math.gcd(dense.replicas // degree, replicas)

    return SpreadDegrees(replicas, like(dense.params), like(dense.grads), like(dense.states))


def expert_replicas(config: Config) -> int:
    """Ranks of a pipeline stage that hold the same experts."""
    p = config.parallel
    return max(1, p.tp * p.cp * p.dp // (p.ep * p.etp))


def point(config: Config) -> str:
    """The point of the space, for people: the name of `parallel.data.sharding`, and what the job sets itself."""
    data, dense = config.parallel.data, dense_spread(config)
    if not is_flat(config) or (data.params, data.grads, data.states) == (None, None, None):
        return data.sharding
    params = f"parameters over {dense.params}, " if dense.params > 1 else ""
    grads = f"gradients over {dense.grads}, " if dense.grads > 1 else ""
    return f"{params}{grads}states over {dense.states} of {dense.replicas}"


def part_layers(config: Config) -> int | None:
    """The most layers of a part-stage; none: a stage is one. One layer where parameters are spread and the job says
    nothing: so many are whole at a time."""
    spread = is_flat(config) and dense_spread(config).params > 1
    return 1 if config.memory.group is None and spread else config.memory.group


def over(config: Config, wanted: SpreadOver) -> int:
    """Ranks of dp · cp that a key stands for. Whoever has validated the job knows that they divide dp · cp."""
    p = config.parallel
    replicas = p.dp * p.cp
    if wanted == "all":
        return replicas
    if wanted == "node":
        return math.gcd(replicas, max(1, (config.hardware.ranks_per_node or p.tp) // p.tp))
    return wanted
