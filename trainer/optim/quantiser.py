"""Numbers in 4 or 8 bits: codes of a table of levels, times scales of their neighbourhood.

    x ≈ levels[code] · S(x)        code: of the level nearest to x / S(x)

S is the largest |x| of a block of neighbours in a row (Dettmers et al., 2110.02861), or, with rank-1 normalisation,
the smaller of the largest |x| of the element's row and of its column (Li et al., 2309.01507, §4): of a matrix in which
a few rows and columns are much larger than the rest, the others keep their precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ...parallel.global_tensor import Box, Placement, boxes


def dynamic_levels(bits: int, *, signed: bool) -> tuple[float, ...]:
    """Levels that are dense near zero (Dettmers, 1511.04561): a decade for each exponent, cut into equal intervals
    whose middles are levels, twice as many in each next decade; 0 and 1 beside. There is no −1.
    """
    exponents = bits - 1
    levels = [0.0, 1.0]
    for exponent in range(exponents):
        count = 2 ** (exponent if signed else exponent + 1)
        middles = [0.1 + 0.9 * (i + 0.5) / count for i in range(count)]
        for sign in (1, -1) if signed else (1,):
            levels += [sign * middle * 10.0 ** (exponent - exponents + 1) for middle in middles]
    return tuple(sorted(levels))


def linear_levels(bits: int) -> tuple[float, ...]:
    """1/n, 2/n, …, 1 for n = 2^bits: without zero, which would make 1 / √v infinite."""
    count = 2**bits
    return tuple((i + 1) / count for i in range(count))


@dataclass(frozen=True)
class Code:
    """How one state is kept.

    Args:
        bits: of a code.
        levels: in ascending order, 2^bits.
        block: neighbours in a row that share a scale; 0: rank-1 normalisation.
    """

    bits: int
    levels: tuple[float, ...]
    block: int

    def encode(self, values: Tensor, scales: Tensor) -> Tensor:
        """Codes, uint8 (n,), of values (n,) with scales (n,); zeros where the scale is."""
        _, between = _table(self.levels, values.dtype, values.device)
        ratio = torch.where(scales > 0, values / scales, torch.zeros_like(values))
        return torch.bucketize(ratio, between).to(torch.uint8)

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Values (n,) in the scales' precision, of codes (n,)."""
        levels, _ = _table(self.levels, scales.dtype, scales.device)
        return levels[codes.int()] * scales

    def packed(self, count: int) -> int:
        """Bytes of so many codes."""
        return count if self.bits == 8 else (count + 1) // 2

    def pack(self, codes: Tensor) -> Tensor:
        """(n,) → (packed(n),): two 4-bit codes in a byte."""
        if self.bits == 8:
            return codes
        even = F.pad(codes, (0, codes.numel() % 2)).view(-1, 2)
        return even[:, 0] | (even[:, 1] << 4)

    def unpack(self, packed: Tensor, count: int) -> Tensor:
        """(packed(count),) → (count,)."""
        if self.bits == 8:
            return packed
        return torch.stack((packed & 15, packed >> 4), dim=1).view(-1)[:count]


@cache
def _table(levels: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Levels, and the middles between neighbours."""
    exact = torch.tensor(levels, dtype=torch.float64)
    return exact.to(device, dtype), ((exact[1:] + exact[:-1]) / 2).to(device, dtype)


FORMATS: dict[str, tuple[Code, Code]] = {
    "int8": (Code(8, dynamic_levels(8, signed=True), 256), Code(8, dynamic_levels(8, signed=False), 256)),
    "int4": (Code(4, dynamic_levels(4, signed=True), 128), Code(4, linear_levels(4), 0)),
}
"""How the first and the second moment are kept, by `optim.states`."""


# Scales -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ElementRun:
    """Elements [start, stop), row by row, of a rank's slice (n, a, b) of a global tensor (N, A, B).

    Blocks and rows are those of the global tensor, so that no value depends on how it is cut.

    Args:
        whole: (N, A, B).
        shape: (n, a, b).
        offsets: of the slice in the whole.
        start, stop: not empty.
    """

    whole: tuple[int, int, int]
    shape: tuple[int, int, int]
    offsets: tuple[int, int, int]
    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.stop - self.start

    def boxes(self) -> list[tuple[Box, slice]]:
        """Parts of rows, and whole rows, with their elements in the run."""
        found = boxes(Placement.whole(self.shape), self.start, self.stop)
        return [
            (box, slice(box.local_flat_start - self.start, box.local_flat_start - self.start + box.numel))
            for box in found
        ]


class Blocks:
    """The scales of a run whose blocks are `size` neighbours in a row of the global tensor, in the order of the slice.

    `ids` numbers the blocks of the whole slice; a run has some that follow each other.
    """

    def __init__(self, run: ElementRun, size: int) -> None:
        self.run, self.size = run, size
        first = run.offsets[2] // size
        self.row = (run.offsets[2] + run.shape[2] - 1) // size - first + 1
        """Blocks that a row of the slice touches."""
        self._first = first
        self.ids = range(self._id(run.start), self._id(run.stop - 1) + 1)
        if run.shape[2] % size and run.shape[2] < run.whole[2]:
            # Blocks straddle cuts: whole rows, so that a rank can pass on what it was told of them.
            rows = self.ids.start // self.row, (self.ids.stop - 1) // self.row + 1
            self.ids = range(rows[0] * self.row, rows[1] * self.row)
        self.count = len(self.ids)

    def ids_of_rows(self, rows: Sequence[int]) -> Tensor:
        """The blocks (n,) of rows of the slice."""
        return (torch.tensor(rows)[:, None] * self.row + torch.arange(self.row)).view(-1)

    def ids_of_cuts(self) -> Tensor:
        """The blocks that straddle cuts of the matrix along its rows, all rows of one cut after the other; −1: of other
        slices (n,)."""
        n, a, b = self.run.shape
        cuts = [cut for cut in range(b, self.run.whole[2], b) if cut % self.size]
        inside = torch.tensor([cut // self.size - self._first for cut in cuts], dtype=torch.int64)[:, None]
        ids = torch.arange(n * a) * self.row + inside
        return torch.where((inside >= 0) & (inside < self.row), ids, -1).view(-1)

    def places(self, ids: Tensor) -> Tensor:
        """Where blocks (n,) are among the run's scales; −1: they are not."""
        return torch.where((ids >= self.ids.start) & (ids < self.ids.stop), ids - self.ids.start, -1)

    def _id(self, element: int) -> int:
        row, column = divmod(element, self.run.shape[2])
        return row * self.row + (self.run.offsets[2] + column) // self.size - self._first

    def _of(self, box: Box) -> tuple[slice, int, int, int]:
        """The scales of a box, its rows, its blocks in a row, and how far into the first it begins."""
        rows, width = box.sizes[0] * box.sizes[1], box.sizes[2]
        into = (self.run.offsets[2] + box.offsets[2]) % self.size
        blocks = -(-(into + width) // self.size)
        at = self._id(box.local_flat_start) - self.ids.start
        return slice(at, at + rows * blocks), rows, blocks, into

    def raise_to(self, scales: Tensor, values: Tensor) -> None:
        """scales (count,) ← the larger of themselves and the largest |values| (run.count,)."""
        for box, part in self.run.boxes():
            at, rows, blocks, into = self._of(box)
            own = values[part].abs().view(rows, -1)
            own = F.pad(own, (into, blocks * self.size - into - own.shape[1])).view(-1, self.size).amax(1)
            torch.maximum(scales[at], own, out=scales[at])

    def spread(self, scales: Tensor) -> Tensor:
        """Each element's scale (run.count,)."""
        spread = scales.new_empty(self.run.count)
        for box, part in self.run.boxes():
            at, rows, blocks, into = self._of(box)
            each = scales[at].view(rows, blocks, 1).expand(-1, -1, self.size).reshape(rows, -1)
            spread[part] = each[:, into : into + box.sizes[2]].reshape(-1)
        return spread


class RowsAndColumns:
    """The scales of a run with rank-1 normalisation: the rows that it touches, then all columns of its matrices."""

    def __init__(self, run: ElementRun) -> None:
        self.run = run
        _, a, b = run.shape
        self.rows = range(run.start // b, (run.stop - 1) // b + 1)
        self.matrices = range(self.rows.start // a, (self.rows.stop - 1) // a + 1)
        self.count = len(self.rows) + len(self.matrices) * b

    def ids_of_rows(self, rows: Sequence[int]) -> Tensor:
        """All rows and columns of the slice (n,): who shares a row has columns in common with everybody."""
        n, a, b = self.run.shape
        return torch.arange(n * a + n * b)

    def ids_of_cuts(self) -> Tensor:
        """The rows, where the matrix is cut along them, and the columns where it is along those (n,)."""
        n, a, b = self.run.shape
        rows = torch.arange(n * a if b < self.run.whole[2] else 0)
        columns = torch.arange(n * b if a < self.run.whole[1] else 0) + n * a
        return torch.cat((rows, columns))

    def places(self, ids: Tensor) -> Tensor:
        """As of `Blocks`; rows of the slice are numbered first, then its columns."""
        n, a, b = self.run.shape
        row, column = ids - self.rows.start, ids - n * a - self.matrices.start * b
        of_rows = torch.where((ids < n * a) & (row >= 0) & (row < len(self.rows)), row, -1)
        held = (ids >= n * a) & (column >= 0) & (column < len(self.matrices) * b)
        return torch.where(held, column + len(self.rows), of_rows)

    def split(self, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (r,) and columns (matrices, b)."""
        rows, columns = scales.split([len(self.rows), self.count - len(self.rows)])
        return rows, columns.view(-1, self.run.shape[2])

    def raise_to(self, scales: Tensor, values: Tensor) -> None:
        """As of `Blocks`."""
        rows, columns = self.split(scales)
        for box, part in self.run.boxes():
            own = values[part].abs().view(box.sizes)
            of_rows, of_columns = self._parts(rows, columns, box)
            torch.maximum(of_rows, own.amax(2).view(-1), out=of_rows)
            of_columns.copy_(torch.maximum(of_columns, own.amax(1)))

    def spread(self, scales: Tensor) -> Tensor:
        """As of `Blocks`."""
        rows, columns = self.split(scales)
        spread = scales.new_empty(self.run.count)
        for box, part in self.run.boxes():
            of_rows, of_columns = self._parts(rows, columns, box)
            each = torch.minimum(of_rows.view(*box.sizes[:2], 1), of_columns[:, None])
            spread[part] = each.reshape(-1)
        return spread

    def _parts(self, rows: Tensor, columns: Tensor, box: Box) -> tuple[Tensor, Tensor]:
        (i, j, k), (x, y, z) = box.offsets, box.sizes
        first = i * self.run.shape[1] + j - self.rows.start
        return rows[first : first + x * y], columns[i - self.matrices.start :][:x, k : k + z]
