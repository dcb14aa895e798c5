"""What a checkpoint holds of a run, under global names."""

from __future__ import annotations

from typing import Any

from ...parallel.global_tensor import GlobalTensor
from ...parallel.replicas.protocol import OptimizerShard, Replicas
from ..optim.states import Optimizer
from ..setup import Parts


def units_by_key(replicas: Replicas) -> dict[str, OptimizerShard]:
    """All units of this rank."""
    return {unit.key: unit for bucket in range(replicas.buckets) for unit in replicas.units(bucket)}


def model_tensors(parts: Parts) -> dict[str, GlobalTensor]:
    """`model/NAME` → this rank's piece of the parameter in full precision, or the buffer."""
    values = {unit.key: unit.value for unit in units_by_key(parts.replicas).values()}
    buffers = {f"model/{name}": GlobalTensor.of(buffer) for name, buffer in parts.buffers.items()}
    return _tensors(parts.replicas, {"model": values}) | buffers


def all_tensors(parts: Parts, optimizer: Optimizer) -> dict[str, GlobalTensor]:
    """`model_tensors` and `optim/STATE/NAME`."""
    kinds: dict[str, dict[str, Any]] = {}
    for key, states in optimizer.states.items():
        for state, value in states.items():
            kinds.setdefault(f"optim/{state}", {})[key] = value
    return model_tensors(parts) | _tensors(parts.replicas, kinds)


def _tensors(replicas: Replicas, kinds: dict[str, dict[str, Any]]) -> dict[str, GlobalTensor]:
    return {
        f"{kind}/{piece.name}": GlobalTensor(
            piece.sharding.placement, piece.start, piece.stop, units[piece.unit][piece.at :][: piece.stop - piece.start]
        )
        for kind, units in kinds.items()
        for piece in replicas.pieces()
    }
