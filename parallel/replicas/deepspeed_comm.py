"""DeepSpeed on our mesh: who stands where, and its collectives through ours.

DeepSpeed asks a Megatron-like object (`mpu`) for groups and ranks, and a backend for collectives. With these two its
collectives are recorded, can be aborted, and sum in rank order, as FSDP2's do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import deepspeed.comm.comm as state
import torch
import torch.distributed as dist
from deepspeed.comm.backend import Backend
from deepspeed.comm.torch import TorchBackend
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.utils import groups
from torch import Tensor

from ..comm import collectives
from ..comm.collectives import Handle
from ..comm.mesh import Axis, Mesh


class DeepSpeedMesh:
    """What DeepSpeed calls an mpu: the ranks that share optimizer states, and those that share a replica.

    Args:
        mesh: of this rank.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._data, self._tensor = mesh.axis("data"), mesh.axis("tp")

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self._data.group

    def get_data_parallel_rank(self) -> int:
        return self._data.rank

    def get_data_parallel_world_size(self) -> int:
        return self._data.size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._tensor.group

    def get_model_parallel_rank(self) -> int:
        return self._tensor.rank

    def get_model_parallel_world_size(self) -> int:
        return self._tensor.size


class RecordedBackend(TorchBackend):
    """DeepSpeed's backend for the axes of a mesh; groups that are none of these are torch's own business.

    TorchBackend's constructor would compile an operator for inference on a CPU, for minutes.

    Args:
        axes: whose groups DeepSpeed is given.
    """

    def __init__(self, axes: Sequence[Axis]) -> None:
        Backend.__init__(self, name="pentad")
        self._axes = [axis for axis in axes if axis.size > 1]
        self.shm_comm_op = None
        self.single_gpu_mode, self.initialized, self.using_mpi = False, True, False
        # DeepSpeed launches many small collectives one by one, where these two would be torch's and unrecorded.
        self.has_all_reduce_coalesced = self.has_coalescing_manager = False
        self.all_gather_function = self.get_all_gather_function()
        self.reduce_scatter_function = self.get_reduce_scatter_function()

    def _axis(self, group: Any) -> Axis | None:
        return next((axis for axis in self._axes if group is not None and axis.group is group), None)

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        axis, kind = self._axis(group), _KINDS.get(str(self._reduce_op(op)))
        if axis is None or kind is None or tensor.dtype == torch.uint8:
            return super().all_reduce(tensor, op, group, async_op)
        return _done(collectives.all_reduce(tensor, axis, kind), async_op)

    def all_gather_into_tensor(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        axis = self._axis(group)
        if axis is None:
            return super().all_gather_into_tensor(output_tensor, input_tensor, group, async_op)
        return _done(collectives.all_gather(input_tensor, axis, out=output_tensor), async_op)

    def reduce_scatter_tensor(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        axis = self._axis(group)
        if axis is None or _KINDS.get(str(self._reduce_op(op))) != "sum":
            return super().reduce_scatter_tensor(output_tensor, input_tensor, op, group, async_op)
        return _done(collectives.reduce_scatter(input_tensor, axis, out=output_tensor), async_op)

    def broadcast(self, tensor: Tensor, src: int, group: Any = None, async_op: bool = False) -> Any:
        axis = self._axis(group)
        if axis is None:
            return super().broadcast(tensor, src, group, async_op)
        return _done(collectives.broadcast(tensor, axis, axis.ranks.index(src)), async_op)


_KINDS = {str(dist.ReduceOp.SUM): "sum", str(dist.ReduceOp.MAX): "max"}


def _done(handle: Handle, async_op: bool) -> Handle | None:
    if async_op:
        return handle
    handle.wait()
    return None


def enter_mesh(mesh: Mesh) -> DeepSpeedMesh:
    """DeepSpeed's own state, which it keeps for a process, is that of this mesh from now on, until `leave_mesh`."""
    state.cdb = RecordedBackend([mesh.axis("data"), mesh.axis("tp")])
    # ZeRO 3 numbers parameters and modules, in a process's whole life, and compares the numbers between ranks.
    Init.param_id = 0
    (modules,) = parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__ or ([0],)
    modules[0] = 0
    parameter_offload.FWD_MODULE_STACK.clear()
    return DeepSpeedMesh(mesh)


def leave_mesh() -> None:
    """DeepSpeed forgets the mesh."""
    groups.mpu = state.cdb = None
    parameter_offload.FWD_MODULE_STACK.clear()
