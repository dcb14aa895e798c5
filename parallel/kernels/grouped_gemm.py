"""How the GEMMs of a grouped projection are done: one after the other, as one grouped GEMM, or as one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ...configs.errors import UserError
from ...configs.validation.kernels import bmm_problem, grouped_mm_problem
from .upload import Download, upload
from .weight_products import add, add_product, add_products, is_exact

_NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Groups:
    """How many rows each expert has.

    Args:
        counts: of every expert, on the host.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self.rows, self.experts = sum(counts), len(counts)
        self._counts: tuple[int, ...] | None = tuple(counts)
        self._ends: dict[torch.device, Tensor] = {}
        self._coming: Download | None = None

    @staticmethod
    def on_device(ends: Tensor, rows: int) -> Groups:
        """Numbers that a device knows: ends (E,) int32, the last row + 1 of each expert; behind them up to `rows` rows
        that are nobody's."""
        groups = Groups(())
        groups.rows, groups.experts, groups._counts = rows, len(ends), None
        groups._ends[ends.device], groups._coming = ends, Download(ends)
        return groups

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers on the host, which waits here if they have not come yet: they left when the groups were made."""
        if self._counts is None:
            assert self._coming is not None
            self._counts = tuple(b - a for a, b in pairwise((0, *map(int, self._coming.tolist()))))
        return self._counts

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
            self._ends[device] = upload(torch.tensor(self.counts).cumsum(0).int(), device)
        return self._ends[device]

    @property
    def equal(self) -> bool:
        """Whether every expert is known to have the same number of rows."""
        return self._counts is not None and len(set(self._counts)) == 1


class Gemms(Protocol):
    """The three products of a grouped projection of x (R, in) by weight (E, out, in)."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """y[rows of e] = x[rows of e] W[e]ᵀ, as (R, out)."""
        ...

    def backward(self, dys: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        """Σ dy[rows of e] W[e] over the projections (dy (R, out), W (E, out, in)) of the same x, as (R, in)."""
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

    def backward(self, dys: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        dx = dys[0].new_empty(len(dys[0]), weights[0].shape[2])
        for expert, start, stop in self.groups.runs():
            rows = dx[start:stop]
            torch.mm(dys[0][start:stop], weights[0][expert], out=rows)
            for dy, weight in zip(dys[1:], weights[1:], strict=True):
                rows.addmm_(dy[start:stop], weight[expert])
        return dx

    def add_weight(self, dy: Tensor, x: Tensor, total: Tensor, fresh: bool) -> None:
        if fresh:
            _clear_idle(total, self.groups)
        for expert, start, stop in self.groups.runs():
            add_product(total[expert], dy[start:stop], x[start:stop], fresh)


@dataclass(frozen=True)
class RoundedLoop:
    """One GEMM per expert, of rounded-up numbers of rows.

    oneDNN compiles a kernel for each new 16-bit shape and keeps the last 1024. Measured, that is 0.9 ms (a quarter of
    a GEMM of 500 rows by 1536 × 512) and 0.65 MiB each, and experts' numbers of rows hardly ever repeat. Rounding adds
    3 % of arithmetic and leaves 16 numbers per doubling.
    """

    groups: Groups

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        y = x.new_empty(len(x), weight.shape[1])
        for expert, rows, out in self._windows(y):
            torch.mm(x[rows], weight[expert].t(), out=out)
        return y

    def backward(self, dys: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        dx = dys[0].new_empty(len(dys[0]), weights[0].shape[2])
        for expert, rows, out in self._windows(dx):
            torch.mm(dys[0][rows], weights[0][expert], out=out)
            for dy, weight in zip(dys[1:], weights[1:], strict=True):
                out.addmm_(dy[rows], weight[expert])
        return dx

    def _windows(self, y: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
        """(expert, rows to multiply, where the product goes). What it has too much the next experts write over."""
        for expert, start, stop in self.groups.runs():
            rows = _window(start, stop, len(y))
            if rows.start == start:
                yield expert, rows, y[rows]
            else:  # at the end, where only experts stand that were written already
                spare = y.new_empty(rows.stop - rows.start, y.shape[1])
                yield expert, rows, spare
                y[start:stop] = spare[start - rows.start : stop - rows.start]

    def add_weight(self, dy: Tensor, x: Tensor, total: Tensor, fresh: bool) -> None:
        if fresh:
            _clear_idle(total, self.groups)
        narrow = x if x.shape[1] < dy.shape[1] else dy
        for expert, start, stop in self.groups.runs():
            rows = _window(start, stop, len(x))
            # The other experts' rows in the window count for nothing: one factor is 0 there.
            own = narrow.new_zeros(rows.stop - rows.start, narrow.shape[1])
            own[start - rows.start : stop - rows.start] = narrow[start:stop]
            left, right = (dy[rows], own) if narrow is x else (own, x[rows])
            add(total[expert], torch.mm(left.t(), right), fresh)


def _window(start: int, stop: int, end: int) -> slice:
    """A rounded-up number of rows from `start` on, or up to `end`; the rows themselves, if there are too few."""
    count = stop - start
    step = max(8, 2 ** (count.bit_length() - 1) // 16)
    size = -(-count // step) * step
    return slice(start, stop) if size > end else slice(min(start, end - size), min(start, end - size) + size)


def _clear_idle(total: Tensor, groups: Groups) -> None:
    for expert, count in enumerate(groups.counts):
        if not count:
            total[expert].zero_()


LONG_ROWS = 256
"""Rows of an expert, on average, from which on its weight gradient gets a product of its own where that loses nothing:
grouped_mm rounds its results. With fewer rows the starts of the kernels would show."""


@dataclass(frozen=True)
class GroupedMm:
    """torch's grouped GEMM: one kernel on CUDA, which reads the groups' ends there; a loop in C++ on CPU."""

    groups: Groups

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.grouped_mm(x, weight.transpose(1, 2), offs=self.groups.ends(x.device))

    def backward(self, dys: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        ends = self.groups.ends(dys[0].device)
        dx = F.grouped_mm(dys[0], weights[0], offs=ends)
        for dy, weight in zip(dys[1:], weights[1:], strict=True):
            dx.add_(F.grouped_mm(dy, weight, offs=ends))
        return dx

    def add_weight(self, dy: Tensor, x: Tensor, total: Tensor, fresh: bool) -> None:
        if is_exact(x.device) and len(x) >= LONG_ROWS * self.groups.experts:
            Loop(self.groups).add_weight(dy, x, total, fresh)
        else:
            add(total, F.grouped_mm(dy.t(), x, offs=self.groups.ends(x.device)), fresh)


@dataclass(frozen=True)
class Bmm:
    """One batched GEMM of experts with equally many rows."""

    groups: Groups

    def _batch(self, x: Tensor) -> Tensor:
        return x.view(self.groups.experts, -1, x.shape[1])

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.bmm(self._batch(x), weight.transpose(1, 2)).view(len(x), -1)

    def backward(self, dys: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        dx = torch.bmm(self._batch(dys[0]), weights[0])
        for dy, weight in zip(dys[1:], weights[1:], strict=True):
            dx.baddbmm_(self._batch(dy), weight)
        return dx.view(len(dys[0]), -1)

    def add_weight(self, dy: Tensor, x: Tensor, total: Tensor, fresh: bool) -> None:
        add_products(total, self._batch(dy), self._batch(x), fresh)


def gemms(compute: str, x: Tensor, weight: Tensor, groups: Groups) -> Gemms:
    """The way of `model.moe.compute` for these operands.

    Args:
        x: (R, in) or (R, out).
        weight: (E, out, in).

    Raises:
        UserError: the way cannot do it.
    """
    if not groups.rows:
        return Loop(groups)  # nothing to multiply
    match compute:
        case "auto":
            return _fastest(x, weight, groups)
        case "loop":
            return Loop(groups)
        case "grouped_mm":
            problem = grouped_mm_problem(_NAMES[x.dtype], weight.shape[1], weight.shape[2])
            if problem is not None:
                raise UserError(problem)
            return GroupedMm(groups)
        case "bmm":
            if not groups.equal:
                raise UserError(bmm_problem(f"here they have {min(groups.counts)} to {max(groups.counts)}"))
            return Bmm(groups)
    raise ValueError(f"{compute!r} is none of auto, loop, grouped_mm, bmm")


MANY_ROWS = 64
"""On CPU: below so many rows of an expert, on average, the numbers repeat by themselves and Python's loop shows."""


def _fastest(x: Tensor, weight: Tensor, groups: Groups) -> Gemms:
    if groups.equal and groups.experts > 1:
        return Bmm(groups)
    half = x.dtype in (torch.bfloat16, torch.float16)
    able = half and grouped_mm_problem(_NAMES[x.dtype], weight.shape[1], weight.shape[2]) is None
    if x.is_cuda:
        return GroupedMm(groups) if able and x.dtype == torch.bfloat16 else Loop(groups)
    if able and len(x) < MANY_ROWS * groups.experts:
        return GroupedMm(groups)
    return RoundedLoop(groups) if half else Loop(groups)
