"""Whether replicas can be spread as `parallel.data` says."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import Problem
from ..fields import value_of
from ..reading.spread import dense_spread, is_flat
from ..schema import Config

_SECTION = "parallel.data"
_PER_NODE = "hardware.ranks_per_node"
_KEYS = "params", "grads", "states"


def validate_spread(config: Config) -> list[Problem]:
    """Every problem that follows from the values alone."""
    if not is_flat(config) or config.parallel.dp is None or config.parallel.dp * config.parallel.cp < 1:
        return []
    found = [each for key in _KEYS for each in (*_divisors(config, key), *_node(config, key))]
    return found or [*_nested(config), *_whole_sums(config), *_whole_params(config)]


def _divisors(config: Config, key: str) -> Iterator[Problem]:
    p = config.parallel
    replicas, wanted = p.dp * p.cp, value_of(p.data, key)
    if not isinstance(wanted, int) or (wanted >= 1 and replicas % wanted == 0):
        return
    near = max(size for size in range(1, replicas + 1) if replicas % size == 0 and size <= max(1, wanted))
    message = (
        f"{wanted} does not divide parallel.dp={p.dp} x parallel.cp={p.cp} = {replicas}, the ranks that hold the same "
        f"parameters; set {_SECTION}.{key}={near}"
    )
    yield Problem(f"{_SECTION}.{key}", message, ("parallel.dp", "parallel.cp"))


def _node(config: Config, key: str) -> Iterator[Problem]:
    per_node, tp, data = config.hardware.ranks_per_node, config.parallel.tp, config.parallel.data
    named = data.sharding == "hsdp" and key == next((each for each in _KEYS if value_of(data, each) is None), "")
    if value_of(data, key) != "node" and not named:
        return
    fault, what = ("sharding", "hsdp") if named else (key, "node")
    if per_node is None:
        message = f"{what}: nobody knows how many ranks a node has; set {_PER_NODE}"
        yield Problem(f"{_SECTION}.{fault}", message, (_PER_NODE,))
    elif per_node >= 1 and tp >= 1 and per_node % tp:
        message = (
            f"{what}: {_PER_NODE}={per_node} is no multiple of parallel.tp={tp}, so that ranks with the same "
            f"parameters stand in other places on each node; set {_SECTION}.{key} to a number of ranks"
        )
        yield Problem(f"{_SECTION}.{fault}", message, (_PER_NODE, "parallel.tp"))


def _nested(config: Config) -> Iterator[Problem]:
    spread = dense_spread(config)
    if spread.grads % spread.params:
        message = (
            f"parameters over {spread.params} ranks and gradients over {spread.grads}: who has a share would not have "
            f"its gradient; set {_SECTION}.grads to a multiple of {spread.params}, or {_SECTION}.params to a divisor "
            f"of {spread.grads}"
        )
        yield Problem(f"{_SECTION}.params", message, (f"{_SECTION}.grads", f"{_SECTION}.sharding"))
    elif spread.states % spread.grads:
        message = (
            f"gradients over {spread.grads} ranks and states over {spread.states}: who updates a share would not have "
            f"its gradient; set {_SECTION}.states to a multiple of {spread.grads}, or {_SECTION}.grads to a divisor of "
            f"{spread.states}"
        )
        yield Problem(f"{_SECTION}.grads", message, (f"{_SECTION}.states", f"{_SECTION}.sharding"))


def _whole_sums(config: Config) -> Iterator[Problem]:
    """What needs gradients that rest whole until the update."""
    grads = dense_spread(config).grads
    keys = (f"{_SECTION}.grads", f"{_SECTION}.sharding")
    if config.faults.numerics.checksums and grads > 1:
        message = (
            f"gradients over {grads} ranks do not rest anywhere whole, where they could be checked; set "
            f"{_SECTION}.grads=1, or faults.numerics.replicas_every alone"
        )
        yield Problem("faults.numerics.checksums", message, keys)
    if config.train.deterministic == "elastic" and grads > 1:
        message = (
            f"elastic: gradients over {grads} ranks are scattered in rounded parts; set {_SECTION}.grads=1, or "
            "train.deterministic=true"
        )
        yield Problem("train.deterministic", message, keys)


def _whole_params(config: Config) -> Iterator[Problem]:
    """What does not go together with parameters that are spread."""
    params = dense_spread(config).params
    if params > 1 and config.faults.numerics.replicas_every > 0:
        message = f"parameters over {params} ranks have no whole copies that could be compared; set {_SECTION}.params=1"
        yield Problem("faults.numerics.replicas_every", message, (f"{_SECTION}.params", f"{_SECTION}.sharding"))
