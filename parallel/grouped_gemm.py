"""How the GEMMs of a grouped projection are done: one after the other, as one grouped GEMM, or as one batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..configs.errors import Problem, UserError


@dataclass(frozen=True)
class Groups:
    """How many rows each expert has.

    Args:
        counts: of every expert, on the host.
    """

    counts: tuple[int, ...]
    _ends: dict[torch.device, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """(expert, first row, last row + 1), without the experts that have none."""
        start = 0
        for expert, count in enumerate(self.counts):
            if count:
                yield expert, start, start + count
            start += count

    def ends(self, device: torch.device) -> Tensor:
        """(E,) int32 on the device: the last row + 1 of each expert; copied there once."""
        if device not in self._ends:
            ends = torch.tensor(self.counts).cumsum(0).int()
            if device.type == "cuda":
                ends = ends.pin_memory().to(device, non_blocking=True)
            self._ends[device] = ends
        return self._ends[device]

    @property
    def equal(self) -> bool:
        """Whether every expert has the same number of rows."""
        return len(set(self.counts)) == 1


class Gemms(Protocol):
    """The three products of a grouped projection of x (R, in) by weight (E, out, in)."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """y[rows of e] = x[rows of e] W[e]ᵀ, as (R, out)."""
        ...

    def backward(self, dy: Tensor, weight: Tensor, dx: Tensor | None) -> Tensor:
        """dy[rows of e] W[e], as (R, in), added to dx where that is given."""
        ...

    def add_weight(self, dy: Tensor, x: Tensor, total: Tensor, fresh: bool) -> None:
        """total[e] (E, out, in), in any precision, becomes (fresh) or gains dy[rows of e]ᵀ x[rows of e]."""
        ...


@dataclass(frozen=True)
class Loop:
    """One GEMM per expert."""

    groups: Groups

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        y = x.new_empty(len(x), weight.shape[1])
        for expert, start, stop in self.groups.runs():
            torch.mm(x[start:stop], weight[expert].t(), out=y[start:stop])
        return y

    def backward(self, dy: Tensor, weight: Tensor, dx: Tensor | None) -> Tensor:
        out = dy.new_empty(len(dy), weight.shape[2]) if dx is None else dx
        for expert, start, stop in self.groups.runs():
            if dx is None:
                torch.mm(dy[start:stop], weight[expert], out=out[start:stop])
            else:
                out[start:stop].addmm_(dy[start:stop], weight[expert])
        return out

    def add_weight(self, dy: Tensor, x: Tensor, total: Tensor, fresh: bool) -> None:
        if fresh:
            for expert, count in enumerate(self.groups.counts):
                if not count:
                    total[expert].zero_()
        for expert, start, stop in self.groups.runs():
            whole, rows = total[expert], dy[start:stop].t()
            if dy.dtype != total.dtype:
                grad = torch.mm(rows, x[start:stop])
                whole.copy_(grad) if fresh else whole.add_(grad)
            elif fresh:
                torch.mm(rows, x[start:stop], out=whole)
            else:
                whole.addmm_(rows, x[start:stop])


@dataclass(frozen=True)
class GroupedMm:
    """torch's grouped GEMM: one kernel on CUDA, which reads the groups' ends there; a loop in C++ on CPU."""

    groups: Groups

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.grouped_mm(x, weight.transpose(1, 2), offs=self.groups.ends(x.device))

    def backward(self, dy: Tensor, weight: Tensor, dx: Tensor | None) -> Tensor:
        grad = F.grouped_mm(dy, weight, offs=self.groups.ends(dy.device))
        return grad if dx is None else dx.add_(grad)

    def add_weight(self, dy: Tensor, x: Tensor, total: Tensor, fresh: bool) -> None:
        grad = F.grouped_mm(dy.t(), x, offs=self.groups.ends(x.device))
        total.copy_(grad) if fresh else total.add_(grad)


@dataclass(frozen=True)
class Bmm:
    """One batched GEMM of experts with equally many rows."""

    groups: Groups

    def _batch(self, x: Tensor) -> Tensor:
        return x.view(len(self.groups.counts), self.groups.counts[0], x.shape[1])

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.bmm(self._batch(x), weight.transpose(1, 2)).view(len(x), -1)

    def backward(self, dy: Tensor, weight: Tensor, dx: Tensor | None) -> Tensor:
        if dx is None:
            return torch.bmm(self._batch(dy), weight).view(len(dy), -1)
        self._batch(dx).baddbmm_(self._batch(dy), weight)
        return dx

    def add_weight(self, dy: Tensor, x: Tensor, total: Tensor, fresh: bool) -> None:
        rows, columns = self._batch(dy).transpose(1, 2), self._batch(x)
        if dy.dtype != total.dtype:
            grad = torch.bmm(rows, columns)
            total.copy_(grad) if fresh else total.add_(grad)
        elif fresh:
            torch.bmm(rows, columns, out=total)
        else:
            total.baddbmm_(rows, columns)


def gemms(compute: str, x: Tensor, weight: Tensor, groups: Groups) -> Gemms:
    """The way of `model.moe.compute` for these operands.

    Args:
        x: (R, in) or (R, out).
        weight: (E, out, in).

    Raises:
        UserError: the way cannot do it.
    """
    if not sum(groups.counts):
        return Loop(groups)  # nothing to multiply
    match compute:
        case "auto":
            return _fastest(x, weight, groups)
        case "loop":
            return Loop(groups)
        case "grouped_mm":
            if x.dtype == torch.float64:
                raise _cannot("grouped_mm has no fp64: set it to loop or auto, or set train.dtype to fp32")
            if not _fits(weight):
                step = 16 // weight.element_size()
                _, out, inner = weight.shape
                raise _cannot(
                    f"grouped_mm needs widths that are multiples of {step} in this precision, the experts' matrices are"
                    f" {out} × {inner}: set it to loop or auto, or change model.hidden or model.moe.ffn"
                )
            return GroupedMm(groups)
        case "bmm":
            if not groups.equal:
                counts = groups.counts
                raise _cannot(
                    f"bmm needs equally many rows for every expert, here they have {min(counts)} to {max(counts)}:"
                    " set it to auto, or set model.moe.pad and model.moe.capacity_factor"
                )
            return Bmm(groups)
    raise _cannot(f"{compute!r} is none of auto, loop, grouped_mm, bmm")


def _cannot(message: str) -> UserError:
    return UserError(Problem("model.moe.compute", message))


def _fits(weight: Tensor) -> bool:
    """Whether both widths are multiples of 16 bytes, as grouped_mm wants them."""
    step = 16 // weight.element_size()
    return not (weight.shape[1] % step or weight.shape[2] % step)


MANY_ROWS = 128
"""From so many rows of an expert on, on average, a GEMM's own time hides what Python takes to start it."""


def _fastest(x: Tensor, weight: Tensor, groups: Groups) -> Gemms:
    if groups.equal and len(groups.counts) > 1:
        return Bmm(groups)
    able = x.dtype != torch.float64 and _fits(weight)
    if x.is_cuda:
        return GroupedMm(groups) if able and x.dtype == torch.bfloat16 else Loop(groups)
    few = len(x) < MANY_ROWS * len(groups.counts)
    return GroupedMm(groups) if able and few else Loop(groups)
