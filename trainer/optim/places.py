"""Where masters and moments lie when they are not on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...configs.errors import Problem, UserError
from ...configs.schema import Config, SgdConfig
from ...parallel.comm.disk import open_disk
from ...parallel.comm.host_memory import HostMemory
from ..memory.estimate import with_states_placed
from ..metrics.notices import warn
from .disk_place import DiskStatePlace


class Fetched(Protocol):
    """Runs of tensors of a place, on their way to where the host can compute with them."""

    def wait(self) -> list[Tensor]:
        """The runs, in the order in which they were asked for, to be overwritten."""
        ...

    def store(self) -> None:
        """Takes the runs, as they are now, back to their place; nobody may use them any more."""
        ...


class StatePlace(Protocol):
    """A place for tensors of one process, which outlives its sessions."""

    direct: bool
    """Whether the host and copy engines can work on the tensors where they lie."""

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A new tensor (numel,) of zeros, which checkpoints read and write like any other.

        Raises:
            UserError: there is no room for it.
        """
        ...

    def reserve(self, runs: Sequence[int]) -> None:
        """Says, before the first of them, that runs of so many bytes will be fetched together."""
        ...

    def fetch(self, runs: Sequence[Tensor]) -> Fetched:
        """Starts to bring views of its tensors, each beginning at a multiple of a page of it."""
        ...

    def settle(self) -> None:
        """Returns when everything that was stored has arrived."""
        ...

    def close(self) -> None:
        """Gives the place back; its tensors are gone."""
        ...


def make_place(cfg: Config, device: torch.device, *, first: bool = True) -> StatePlace | None:
    """Where the job's masters and moments lie; none: on the device.

    Args:
        cfg: the job.
        device: of the parameters.
        first: this rank is the one that warns.

    Raises:
        UserError: the disk cannot be used.
    """
    where, pinned = with_states_placed(cfg).memory.offload_optimizer, device.type == "cuda"
    if where == "none" or not keeps_states(cfg):
        return None
    if where == "host":
        return HostStatePlace(pinned=pinned)
    disk = open_disk(cfg.memory.offload_disk or "")
    if disk.note and first:
        warn(disk.note)
    return DiskStatePlace(disk, pinned=pinned)


def keeps_states(cfg: Config) -> bool:
    """Whether the job has masters or moments."""
    return cfg.train.dtype == "bf16" or not isinstance(cfg.optim, SgdConfig) or bool(cfg.optim.momentum)


class _InPlace:
    """The `Fetched` of what need not be fetched."""

    def __init__(self, runs: Sequence[Tensor]) -> None:
        self._runs = list(runs)

    def wait(self) -> list[Tensor]:
        return self._runs

    def store(self) -> None:
        """Nothing to do."""


class HostStatePlace:
    """The host's memory.

    Args:
        pinned: copy engines of GPUs read and write it.
    """

    direct = True

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._held: list[HostMemory] = []

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        try:
            memory = HostMemory(numel * dtype.itemsize, pinned=self._pinned)
        except MemoryError as error:
            raise UserError(
                Problem("memory.offload_optimizer", f"host: {error}; set disk, or none with more ranks")
            ) from None
        self._held.append(memory)
        return memory.tensor.zero_().view(dtype)

    def reserve(self, runs: Sequence[int]) -> None:
        """Nothing to do."""

    def fetch(self, runs: Sequence[Tensor]) -> Fetched:
        return _InPlace(runs)

    def settle(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        for memory in self._held:
            memory.close()
        self._held = []
