"""Slices of a checkpoint's tensors, read by one process on its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from ..configs.errors import UserError
from ..parallel.global_tensor import GlobalTensor, Placement
from .checkpoint_io import hush_single_process, listed, tensors_of
from .checkpoint_plan import ParallelReader


class CheckpointSlices:
    """A verified checkpoint's tensors under a prefix, by the name behind it.

    Args:
        path: a checkpoint that `Checkpointer.verified` has verified.
        shapes: of the tensors that will be read.
        prefix: of their names.

    Raises:
        UserError: a tensor is missing or has another shape.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], prefix: str = "model/") -> None:
        hush_single_process()
        self._reader = _KnownReader(path)
        self._prefix = prefix
        self._found = tensors_of(self._reader.read_metadata(), prefix)
        problems = [
            f"{prefix}{name}: the checkpoint has {self._found.get(prefix + name, ('no such tensor',))[0]}, not {shape}"
            for name, shape in shapes.items()
            if self._found.get(prefix + name, (None,))[0] != shape
        ]
        if problems:
            raise UserError(*listed(path, problems))

    def read(self, name: str, placement: Placement) -> Tensor:
        """A slice of a tensor, in the checkpoint's dtype."""
        key = self._prefix + name
        out = torch.empty(placement.local_shape, dtype=self._found[key][1])
        piece: Any = GlobalTensor(placement, 0, math.prod(placement.local_shape), out.view(-1))
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        dcp_load({key: piece}, storage_reader=self._reader, planner=planner, no_dist=True)
        return out


class _KnownReader(ParallelReader):
    """Reads the metadata once."""

    _known: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """As of the first call."""
        if self._known is None:
            self._known = super().read_metadata(*args, **kwargs)
        return self._known
