"""Where the states of an optimizer lie: beside what they are of, or in another place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...configs.schema import AdamWConfig, MemoryConfig, OptimConfig
from ...parallel.checksum import ParameterMemory
from ...parallel.comm.mesh import Mesh
from ...parallel.global_tensor import GlobalTensor
from ...parallel.replicas.deepspeed import DeepSpeedReplicas
from ...parallel.replicas.protocol import OptimizerShard, Replicas, ShardSlice, SharedBucket
from .deepspeed import DeepSpeedStates
from .low_bit import LowBitStates
from .offload import OffloadedStates
from .optimizer import UpdateScalars, make_rule
from .places import StatePlace
from .plain import ResidentStates
from .quantiser import FORMATS


class Optimizer(Protocol):
    """Updates units; keeps their states by unit key."""

    states: dict[str, dict[str, Tensor]]
    """Unit key → name → tensor: of the unit's shape, but for coded moments."""

    def prepare(self, unit: OptimizerShard, bucket: SharedBucket | None) -> None:
        """Makes the unit's states, zero, where there are none yet.

        Args:
            unit: what will be updated.
            bucket: of which the unit is this rank's share.
        """
        ...

    def agree(self) -> None:
        """Ends together what a step ended alone; all ranks call it before the first step of a later session."""
        ...

    def step(self, units: Sequence[OptimizerShard], now: UpdateScalars, *, alone: bool = False) -> None:
        """Updates the units, and what follows them in lower precision. Called again after an error with the same
        units, it does what it had not done; `alone`: without any other rank."""
        ...

    def settle(self) -> None:
        """Returns when all states are whole in their place."""
        ...

    def close(self) -> None:
        """Ends what runs beside the step."""
        ...

    def resting(self, units: Mapping[str, OptimizerShard], slices: Sequence[ShardSlice]) -> list[ParameterMemory]:
        """Masters and states as they lie in this process's memory between updates, the same memory every time; none, if
        they lie elsewhere.

        Args:
            units: all, by key.
            slices: of them.
        """
        ...

    def stored(self, slices: Sequence[ShardSlice]) -> dict[str, GlobalTensor]:
        """What a checkpoint holds of the states, by global name (`optim/STATE/NAME`), to be saved or to be filled.

        Args:
            slices: of all units.
        """
        ...

    def loaded(self, tensors: Mapping[str, GlobalTensor]) -> None:
        """Takes over what `stored` gave, filled from a checkpoint.

        Raises:
            UserError: it is none of these states.
        """
        ...


def make_optimizer(
    cfg: OptimConfig,
    device: torch.device,
    place: StatePlace | None = None,
    memory: MemoryConfig | None = None,
    *,
    mesh: Mesh | None = None,
    fixed: bool = False,
    replicas: Replicas | None = None,
) -> Optimizer:
    """The optimizer that the config names.

    Args:
        cfg: which.
        device: of what is updated.
        place: of its states, and of the masters; none: the device.
        memory: how it goes about a place; none: the defaults.
        mesh: of this rank; none: nothing is coded, and no wait recorded.
        fixed: the same updates are made on the same device in every run.
        replicas: whose units are updated; none: those of one rank alone.

    Raises:
        UserError: optim.impl asks for something that is not installed.
    """
    rule = make_rule(cfg, device)
    if isinstance(replicas, DeepSpeedReplicas):
        return DeepSpeedStates({"cpu": make_rule(cfg, torch.device("cpu")), device.type: rule}, replicas)
    if isinstance(cfg, AdamWConfig) and cfg.states in FORMATS:
        if mesh is None:
            raise ValueError("coded moments belong to the ranks of a mesh")
        return LowBitStates(rule, FORMATS[cfg.states], cfg.states_above, mesh)
    if place is None:
        return ResidentStates(rule)
    on_host = rule if device.type == "cpu" else make_rule(cfg, torch.device("cpu"))
    memory = memory or MemoryConfig()
    recorder = mesh.recorder if mesh is not None else None
    return OffloadedStates(rule, on_host, place, device, memory, fixed=fixed, recorder=recorder)
