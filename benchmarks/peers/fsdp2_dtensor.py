"""FSDP2 over pairs of processes that share the model by DTensor tensor parallelism."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from workload import Workload, run_worker

from peers.common import make_model, make_update
from peers.dtensor_tp import apply_tensor_parallel, make_step
from peers.fsdp2 import apply_fsdp, own_sequences

TENSOR_PARALLEL = 2


def build(workload: Workload, policy: str) -> Callable[[Tensor], Tensor]:
    """The training step: global batch to the mean loss of all processes."""
    dist.init_process_group("gloo")
    shape = (dist.get_world_size() // TENSOR_PARALLEL, TENSOR_PARALLEL)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
    mesh._flatten("all")  # lets the gradient norm's two sums be one collective
    model = make_model(workload, policy)
    apply_tensor_parallel(model, mesh["tp"])
    apply_fsdp(model, mesh["dp"], policy)
    local_step = make_step(model, make_update(model, workload, policy), workload)

    def step(tokens: Tensor) -> Tensor:
        mean = local_step(own_sequences(tokens, mesh["dp"]))
        dist.all_reduce(mean, dist.ReduceOp.AVG)
        return mean

    return step


if __name__ == "__main__":
    run_worker(build)
