"""torch.distributed as a stand-in that brings nothing and writes down what is asked of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from torch import Tensor

from pentad.parallel.comm import collectives


@dataclass
class Asked:
    """One collective: its name, the shapes of result and operand, rows from and to each rank, and how often it was
    waited for."""

    name: str
    result: tuple[int, ...]
    operand: tuple[int, ...]
    rows: tuple[list[int] | None, list[int] | None] = (None, None)
    waited: int = 0

    def wait(self) -> bool:
        """As of torch's handle."""
        self.waited += 1
        return True


@dataclass
class StandIn:
    """What stands in for torch.distributed."""

    asked: list[Asked] = field(default_factory=list)

    def _ask(self, name: str, result: Tensor, operand: Tensor, *rows: list[int] | None, **rest: Any) -> Asked:
        assert rest.get("async_op"), f"{name} makes the host wait"
        assert result.is_contiguous() and operand.is_contiguous(), f"{name} takes what is contiguous"
        assert result.dtype == operand.dtype, name
        self.asked.append(Asked(name, tuple(result.shape), tuple(operand.shape), rows or (None, None)))  # type: ignore[arg-type]
        return self.asked[-1]

    def all_to_all_single(self, result: Tensor, x: Tensor, receive: Any = None, send: Any = None, **rest: Any) -> Asked:
        """NCCL's rules: the rows of each rank add up to the tensors'."""
        for rows, tensor in ((receive, result), (send, x)):
            assert rows is None or sum(rows) == len(tensor)
        return self._ask("all_to_all_single", result, x, receive, send, **rest)

    @contextlib.contextmanager
    def standing_in(self) -> Iterator[StandIn]:
        """Inside the block collectives ask this."""
        with patch.object(collectives.dist, "all_to_all_single", self.all_to_all_single):
            yield self
