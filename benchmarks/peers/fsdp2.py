"""torch's FSDP2 without resharding after the forward pass, on transformers' Llama."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from workload import Workload, run_worker

from peers.common import local_value, make_model, make_update


def apply_fsdp(model: nn.Module, mesh: DeviceMesh, policy: str) -> None:
    """Shard every layer and the rest; `mixed`: bf16 compute, fp32 shards and reduction."""
    precision = MixedPrecisionPolicy()
    if policy == "mixed":
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (*model.model.layers, model):  # type: ignore[union-attr]
        fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=False)


def own_sequences(tokens: Tensor, mesh: DeviceMesh) -> Tensor:
    """This process's part of the global batch."""
    return tokens.chunk(mesh.size())[mesh.get_local_rank()]


def build(workload: Workload, policy: str) -> Callable[[Tensor], Tensor]:
    """The training step: global batch to the mean loss of all processes."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    model = make_model(workload, policy)
    apply_fsdp(model, mesh, policy)
    update = make_update(model, workload, policy)

    def step(tokens: Tensor) -> Tensor:
        own = own_sequences(tokens, mesh)
        loss = model(own, labels=own).loss
        loss.backward()
        update()
        mean = local_value(loss.detach())
        dist.all_reduce(mean, dist.ReduceOp.AVG)
        return mean

    return step


if __name__ == "__main__":
    run_worker(build)
