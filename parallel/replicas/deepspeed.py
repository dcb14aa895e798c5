"""Data parallelism by DeepSpeed's engine: ZeRO 1, 2 or 3 and its offload, behind the same verbs as the flat buckets.

DeepSpeed partitions, reduces, gathers and offloads; what an update computes is ours (`UpdateHook`), so that clipping,
the learning rate and the decision to skip are those of every other job. Its division of gradients by the number of
ranks is switched off; ZeRO 3 cannot do without, and is multiplied back.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from ..checksum import ParameterMemory
from ..comm.collectives import all_reduce
from ..comm.mesh import Mesh
from ..pipeline.execute import Handler
from ..pipeline.kind import Kind
from ..sharding_rules import Sharding
from .buckets import decays
from .protocol import OptimizerShard, ShardSlice, SharedCopies, partial_axes


class UpdateHook(torch.optim.Optimizer):
    """What DeepSpeed takes for the optimizer. Its engine calls `step` with some flat masters in `param_groups`, their
    gradients in `grad`.

    Args:
        groups: DeepSpeed's parameter groups, each with `decay`.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0})
        self.update: Callable[[Tensor, bool], None] = lambda flat, decay: None
        """Replaceable from outside: updates a flat tensor, to whose elements weight decay applies or not."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    self.update(flat, group["decay"])


class DeepSpeedReplicas:
    """DeepSpeed's engine around this rank's part of the model.

    Args:
        model: this rank's part of the model, in the training precision.
        where: sharding of each parameter by name.
        mesh: the mesh, several ranks on its data axis.
        config: DeepSpeed's, as its JSON would be.
    """

    buckets = 1

    def __init__(self, model: nn.Module, where: dict[str, Sharding], mesh: Mesh, config: dict[str, Any]) -> None:
        device = next(model.parameters()).device
        # Read when deepspeed is imported: what it demands, not switches of ours.
        os.environ.setdefault("DS_ACCELERATOR", device.type)
        os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
        import deepspeed

        from . import deepspeed_comm, deepspeed_shards

        self._shards, self._leave = deepspeed_shards, deepspeed_comm.leave_mesh
        self._model, self._where, self._data = model, where, mesh.axis("data")
        self._partial = partial_axes(mesh)
        groups = [{"params": [], "decay": decay} for decay in (True, False)]
        for name, param in model.named_parameters():
            groups[not decays(name, where[name])]["params"].append(param)
        self.hook = UpdateHook([group for group in groups if group["params"]])
        mpu = deepspeed_comm.enter_mesh(mesh)
        with _quiet():
            self.engine: Any = deepspeed.initialize(
                model=model, optimizer=self.hook, config=config, mpu=mpu, dist_init_required=False
            )[0]
        self._stage = int(config["zero_optimization"]["stage"])
        self._partial_hooks = list(self._sum_partial())
        self._left = 0
        self._reduced = False

    def _sum_partial(self) -> Iterator[Any]:
        """Gradients that are partial over another axis are summed before DeepSpeed sees them."""
        for name, param in self._params():
            axis = self._partial[self._where[name].partial]
            if axis.size > 1:
                yield param.register_hook(lambda grad, axis=axis: all_reduce(grad.contiguous(), axis).wait())

    def _params(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self._model.named_parameters()

    @property
    def handlers(self) -> dict[Kind, Handler]:
        """None: nothing of it is an operation of the program."""
        return {}

    def start_step(self, microbatches: int) -> None:
        self._left, self._reduced = microbatches, False

    def begin_microbatch(self) -> None:
        if torch.is_grad_enabled():
            self._left -= 1
            self.engine.set_gradient_accumulation_boundary(self._left == 0)

    def reduce(self, bucket: int) -> None:
        """DeepSpeed has reduced in backward; what is left is its division, where it cannot be told to leave it."""
        self._reduced = True
        if self._stage == 3:
            for unit in self.units(bucket):
                unit.grad.mul_(self._data.size)

    def step(self) -> None:
        """The engine's: updates by way of `hook`, and hands the parameters out."""
        self._reduced = False
        self.engine.step()
        if self._stage == 3 and self.engine.optimizer.overflow:
            self.sync_params()  # DeepSpeed leaves the small parameters, which are to be whole all the time, cut

    def units(self, bucket: int) -> list[OptimizerShard]:
        optimizer, found = self.engine.optimizer, []
        for name, param in self._params():
            part = self._shards.held_part(optimizer, param)
            if part is not None:
                grad = self._shards.gradient_of(optimizer, param, part.value.numel())
                sharding = self._where[name]
                counted = self._partial[sharding.partial].rank == 0
                found.append(OptimizerShard(name, part.value, grad, None, decays(name, sharding), counted))
        return found

    def flats(self) -> dict[str, tuple[Tensor, int]]:
        """By the key of each unit: the tensor that `hook` is given, and where in it the unit begins."""
        parts = {name: self._shards.held_part(self.engine.optimizer, param) for name, param in self._params()}
        return {name: (part.flat, part.at) for name, part in parts.items() if part is not None}

    def shared(self, bucket: int) -> None:
        """None: the ranks share parameters in a way of DeepSpeed's own."""

    def gather(self, bucket: int) -> None:
        """Nothing to do: DeepSpeed's step, or with ZeRO 3 each use, has gathered."""

    def copies(self) -> list[SharedCopies]:
        """What other ranks hold copies of: with ZeRO 1 and 2 every parameter."""
        if self._stage == 3:
            return []
        found = []
        for name, param in self._params():
            axes = self._data, self._partial[self._where[name].partial]
            found.append(SharedCopies(axes, (ParameterMemory("parameter", name, param.detach().view(-1)),)))
        return found

    def pieces(self) -> Iterator[ShardSlice]:
        for name, param in self._params():
            part = self._shards.held_part(self.engine.optimizer, param)
            if part is not None:
                yield ShardSlice(name, self._where[name], part.start, part.start + part.value.numel(), name, 0)

    def load(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """Sets parameters and masters from (name, value of this rank's slice), on all ranks together."""
        params = dict(self._params())
        for name, value in values:
            part = self._shards.held_part(self.engine.optimizer, params[name])
            if part is not None:
                part.value.copy_(value.reshape(-1)[part.start :][: part.value.numel()])
        self.sync_params()

    def sync_params(self) -> None:
        """Makes the parameters follow the units after these were loaded from outside."""
        self._shards.follow_masters(self.engine.optimizer)

    def wait_gathers(self) -> None:
        """Nothing to do: DeepSpeed leaves nothing in flight after its step."""

    def clear(self) -> None:
        """Drops the gradients of a step that was reduced and not updated, on all ranks together. In the middle of a
        backward pass DeepSpeed cannot be stopped: its engine goes with the session."""
        if self._reduced:
            update, self.hook.update = self.hook.update, lambda flat, decay: None
            self.step()
            self.hook.update = update

    def close(self) -> None:
        """Ends the engine."""
        for hook in self._partial_hooks:
            hook.remove()
        self.engine.destroy()
        self._leave()

    def keep(self) -> dict[str, Tensor]:
        """Nothing: DeepSpeed's memory cannot be taken over."""
        return {}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what DeepSpeed says while it starts: memory in use, and that it does not know our optimizer."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
