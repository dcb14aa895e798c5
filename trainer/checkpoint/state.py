"""What a checkpoint holds of a run, under global names."""

from __future__ import annotations

from ...parallel.global_tensor import GlobalTensor
from ...parallel.replicas.protocol import OptimizerShard, Replicas
from ..optim.plain import stored_slices
from ..optim.states import Optimizer
from ..setup import Parts


def units_by_key(replicas: Replicas) -> dict[str, OptimizerShard]:
    """All units of this rank."""
    return {unit.key: unit for bucket in range(replicas.buckets) for unit in replicas.units(bucket)}


def model_tensors(parts: Parts) -> dict[str, GlobalTensor]:
    """`model/NAME` → this rank's piece of the parameter in full precision, or the buffer."""
    values = {unit.key: unit.value for unit in units_by_key(parts.replicas).values()}
    buffers = {f"model/{name}": GlobalTensor.of(buffer) for name, buffer in parts.buffers.items()}
    return stored_slices(parts.replicas.pieces(), {"model": values}) | buffers


def all_tensors(parts: Parts, optimizer: Optimizer) -> dict[str, GlobalTensor]:
    """`model_tensors` and `optim/STATE/NAME`."""
    return model_tensors(parts) | optimizer.stored(list(parts.replicas.pieces()))
