"""Fully sharded data parallelism by torch's FSDP2, behind the same verbs as the flat buckets.

FSDP2 launches its own collectives; they run through ours by its communication hooks, so that they are recorded, can
be aborted, and sum in rank order. Its own division of gradients is switched off.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from ..checksum import ParameterMemory
from ..comm import collectives
from ..comm.collectives import Handle
from ..comm.mesh import Axis, Mesh
from ..pipeline.execute import Handler
from ..pipeline.kind import Kind
from ..sharding_rules import Sharding
from .protocol import OptimizerShard, ShardSlice, SharedCopies, adopt, partial_axes


class _Comm:
    """What FSDP2 asks of a communication hook: a buffer, then the collective."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def _result(self, handle: Handle, async_op: bool) -> Handle | None:
        if async_op:
            return handle
        handle.wait()
        return None


class _RecordedAllGather(_Comm):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Handle | None:
        return self._result(collectives.all_gather(input_tensor, self.axis, out=output_tensor), async_op)


class _RecordedReduceScatter(_Comm):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> Handle | None:
        return self._result(collectives.reduce_scatter(input_tensor, self.axis, out=output_tensor), async_op)


class FsdpReplicas:
    """FSDP2 over the data axis, one group per layer and one for the rest.

    The model's parameters are the masters (fp32 for bf16 training, which casts as it gathers). What was `kept` is
    copied: FSDP2 makes its own memory.
    """

    buckets = 1

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[nn.Module],
        where: dict[str, Sharding],
        mesh: Mesh,
        dtype: torch.dtype,
        kept: Mapping[str, Tensor] | None = None,
    ) -> None:
        data = mesh.device_mesh("data")
        precise = next(model.parameters()).dtype
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=precise, cast_forward_inputs=False)
        for part in (*layers, model):
            fully_shard(part, mesh=data, mp_policy=policy)
        self._model, self._where, self._axis = model, where, mesh.axis("data")
        self._left = 0
        self._partial = partial_axes(mesh)
        for part in model.modules():
            if isinstance(part, FSDPModule):
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)
                if self._axis.size > 1:
                    part.set_custom_all_gather(_RecordedAllGather(self._axis))  # pyright: ignore[reportArgumentType]
                    part.set_custom_reduce_scatter(_RecordedReduceScatter(self._axis))  # pyright: ignore[reportArgumentType]

        for name, param in self._params() if kept is not None else ():
            local = param.to_local().detach()
            local.copy_(adopt(kept or {}, name, local.shape, local.dtype, local.device))

    def _params(self) -> Iterator[tuple[str, DTensor]]:
        """The sharded parameters. FSDP2 leaves the root's gathered after a forward that no backward followed, as those
        of an evaluation."""
        assert isinstance(self._model, FSDPModule)
        self._model.reshard()
        for name, param in self._model.named_parameters():
            assert isinstance(param, DTensor)
            yield name, param

    @property
    def handlers(self) -> dict[Kind, Handler]:
        """None: nothing of it is an operation of the program."""
        return {}

    def start_step(self, microbatches: int) -> None:
        self._left = microbatches
        for _, param in self._params():
            param.grad = None

    def begin_microbatch(self) -> None:
        assert isinstance(self._model, FSDPModule)
        if not torch.is_grad_enabled():
            return
        self._left -= 1
        last = self._left == 0
        self._model.set_requires_gradient_sync(last)
        self._model.set_is_last_backward(last)

    def reduce(self, bucket: int) -> None:
        """The data axis is reduced by FSDP2 in backward; what is left are gradients partial over other axes."""
        for _, param in self._params():
            if param.grad is None:  # no token reached it in this step
                param.grad = torch.zeros_like(param)
        for partial, axis in self._partial.items():
            if axis.size == 1:
                continue
            grads = [_local(p.grad) for n, p in self._params() if self._where[n].partial == partial]
            if grads:
                flat = collectives.all_reduce(torch.cat([g.reshape(-1) for g in grads]), axis).wait()
                for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                    grad.copy_(part.view_as(grad))

    def units(self, bucket: int) -> list[OptimizerShard]:
        return [
            OptimizerShard(
                name,
                param.to_local().detach().view(-1),
                param.to_local().new_empty(0) if param.grad is None else _local(param.grad).view(-1),
                None,
                param.dim() > 1,
                self._partial[self._where[name].partial].rank == 0,
            )
            for name, param in self._params()
            if param.to_local().numel()
        ]

    def shared(self, bucket: int) -> None:
        """None: FSDP2 cuts each parameter by itself."""

    def gather(self, bucket: int) -> None:
        """Nothing to do: FSDP2 gathers before use."""

    def copies(self) -> list[SharedCopies]:
        """What the ranks over which its gradients are partial hold copies of; over the data axis there are none."""
        found = []
        for name, param in self._params():
            axis, local = self._partial[self._where[name].partial], param.to_local().detach()
            if axis.size > 1 and local.numel():
                found.append(SharedCopies((Axis.single(""), axis), (ParameterMemory("parameter", name, local),)))
        return found

    def _start(self, param: DTensor) -> int:
        """First element, within the tensor parallel slice, that this rank owns (FSDP2 cuts rows like chunk)."""
        rows = param.shape[0]
        each = -(-rows // self._axis.size)
        return min(self._axis.rank * each, rows) * (param.numel() // rows)

    def pieces(self) -> Iterator[ShardSlice]:
        for name, param in self._params():
            size = param.to_local().numel()
            if size:
                start = self._start(param)
                yield ShardSlice(name, self._where[name], start, start + size, name, 0)

    def load(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """Sets parameters from (name, value of this rank's tensor parallel slice)."""
        params = dict(self._params())
        for name, value in values:
            local = params[name].to_local().detach()
            start = self._start(params[name])
            local.view(-1).copy_(value.reshape(-1)[start : start + local.numel()])

    def sync_params(self) -> None:
        """Nothing to do: the units are the parameters."""

    def wait_gathers(self) -> None:
        """Nothing to do: FSDP2 leaves nothing in flight after backward."""

    def clear(self) -> None:
        """Drops a step's gradients, after a step that was left half-way."""
        for _, param in self._params():
            param.grad = None

    def close(self) -> None:
        """Lets torch forget the mesh, which its cache of DTensor's shardings keeps, with all its groups and threads."""
        _clear_sharding_prop_cache()

    def keep(self) -> dict[str, Tensor]:
        """This rank's shards, for replicas that take this one's place."""
        return {name: param.to_local().detach() for name, param in self._params()}


def _local(grad: Tensor | None) -> Tensor:
    assert isinstance(grad, DTensor)
    return grad.to_local()
