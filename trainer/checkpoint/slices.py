"""Slices of a checkpoint's tensors, read by one process on its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...configs.errors import UserError
from ...parallel.global_tensor import GlobalTensor, Placement
from .io import listed, open_full, refusing, tensors_of
from .tensors import TensorFiles


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
        self._contents = open_full(path)
        self._prefix = prefix
        self._found = tensors_of(self._contents, prefix)
        problems = [
            f"{prefix}{name}: the checkpoint has {self._found.get(prefix + name, ('no such tensor',))[0]}, not {shape}"
            for name, shape in shapes.items()
            if self._found.get(prefix + name, (None,))[0] != shape
        ]
        if problems:
            raise UserError(*listed(path, problems))

    def read(self, name: str, placement: Placement) -> Tensor:
        """A slice of a tensor, in the checkpoint's dtype.

        Raises:
            UserError: the checkpoint does not hold what its index says.
        """
        key = self._prefix + name
        out = torch.empty(placement.local_shape, dtype=self._found[key][1])
        piece = GlobalTensor(placement, 0, math.prod(placement.local_shape), out.view(-1))
        with refusing(self._contents.path), TensorFiles(self._contents) as files:
            files.read({key: piece})
        return out
