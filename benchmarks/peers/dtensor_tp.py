"""torch's DTensor tensor parallelism with sequence parallelism and loss_parallel on transformers' Llama."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from workload import Workload, run_worker

from peers.common import local_value, make_model, make_update, next_tokens


def apply_tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """The plan of torch's tensor-parallel tutorial: activations between blocks are sharded over the sequence."""
    whole, pieces = Replicate(), Shard(1)
    outer: dict[str, ParallelStyle] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=whole, output_layouts=pieces),
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=pieces, output_layouts=Shard(-1), use_local_output=False),
    }
    parallelize_module(model, mesh, outer)
    layer_plan: dict[str, ParallelStyle] = {
        "input_layernorm": SequenceParallel(),
        "self_attn": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": pieces}, desired_input_kwarg_layouts={"hidden_states": whole}
        ),
        **{f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
        "self_attn.o_proj": RowwiseParallel(output_layouts=pieces),
        "post_attention_layernorm": SequenceParallel(),
        "mlp": PrepareModuleInput(input_layouts=pieces, desired_input_layouts=whole),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=pieces),
    }
    for layer in model.model.layers:  # type: ignore[union-attr]
        parallelize_module(layer, mesh, layer_plan)


def make_step(model: nn.Module, update: Callable[[], None], workload: Workload) -> Callable[[Tensor], Tensor]:
    """The training step on this process's sequences: tokens (B, T) to loss."""
    # Inside the model the embedding is already cut along the sequence, so the positions cannot be read off its shape.
    positions = torch.arange(workload.seq_len)[None]

    def step(tokens: Tensor) -> Tensor:
        with loss_parallel():
            logits = model(tokens, position_ids=positions).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), next_tokens(tokens).flatten())
            loss.backward()
        update()
        return local_value(loss.detach())

    return step


def build(workload: Workload, policy: str) -> Callable[[Tensor], Tensor]:
    """The training step: global batch to loss."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    model = make_model(workload, policy)
    apply_tensor_parallel(model, mesh)
    return make_step(model, make_update(model, workload, policy), workload)


if __name__ == "__main__":
    run_worker(build)
