"""Codes of moments against the published formulas, written out element by element."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from pentad.trainer.optim.quantiser import FORMATS, Blocks, Code, ElementRun, RowsAndColumns

PUBLISHED = [-0.8875, -0.6625, -0.4375, -0.2125, -0.0775, -0.0325, -0.0055, 0.0]
PUBLISHED += [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1.0]
"""Levels of the first moment of 4-bit AdamW (thu-ml/low-bit-optimizers)."""


def whole(shape: tuple[int, int, int]) -> ElementRun:
    return ElementRun(shape, shape, (0, 0, 0), 0, shape[0] * shape[1] * shape[2])


def scales_of(code: Code, run: ElementRun) -> Blocks | RowsAndColumns:
    return Blocks(run, code.block) if code.block else RowsAndColumns(run)


def coded(code: Code, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (A, B) and values (A, B)."""
    held = scales_of(code, whole((1, *matrix.shape)))  # type: ignore[arg-type]
    scales = matrix.new_zeros(held.count)
    held.raise_to(scales, matrix.reshape(-1))
    codes = code.encode(matrix.reshape(-1), held.spread(scales))
    return codes.view_as(matrix), code.decode(codes, held.spread(scales)).view_as(matrix)


def by_formula(code: Code, matrix: np.ndarray) -> np.ndarray:
    """Codes by the largest values of blocks of the flattened matrix, or of rows and columns, and a search of all
    levels."""
    size = np.abs(matrix)
    if code.block:
        scale = np.repeat(size.reshape(-1, code.block).max(1), code.block).reshape(matrix.shape)
    else:
        scale = np.minimum(size.max(1)[:, None], size.max(0)[None, :])
    ratio = matrix / scale
    return np.abs(ratio[..., None] - np.array(code.levels)).argmin(-1)


def test_levels_are_those_that_were_published() -> None:
    first, second = FORMATS["int4"]
    assert first.levels == pytest.approx(PUBLISHED) and first.block == 128
    assert second.levels == pytest.approx([(i + 1) / 16 for i in range(16)]) and second.block == 0
    for code in FORMATS["int8"]:
        assert len(set(code.levels)) == 256 and {0.0, 1.0} <= set(code.levels) and code.block == 256
    signed, unsigned = (code.levels for code in FORMATS["int8"])
    assert signed[0] == pytest.approx(-0.99297, abs=1e-5) and min(unsigned) == 0.0
    # The smallest levels: the middle of the lowest decade, and of its lower half.
    assert min(x for x in signed if x > 0) == pytest.approx(5.5e-7)
    assert min(x for x in unsigned if x > 0) == pytest.approx(3.25e-7)


@pytest.mark.parametrize("states", FORMATS)
@pytest.mark.parametrize("moment", [0, 1])
def test_codes_are_those_of_the_formulas(states: str, moment: int) -> None:
    code, draws = FORMATS[states][moment], torch.Generator().manual_seed(moment)
    for shape in ((12, 256), (3, 1024), (100, 512)):
        matrix = torch.randn(shape, generator=draws, dtype=torch.float64) * torch.rand(shape, generator=draws).pow(4)
        matrix = matrix.square() if moment else matrix
        codes, values = coded(code, matrix)
        assert np.array_equal(codes.numpy(), by_formula(code, matrix.numpy()))
        grid = np.unique(values.numpy().round(15)).size
        assert grid > 16
        # No value clips: the error is at most half of the widest gap between levels (below the lowest one of the second
        # moment, all of it), of the largest value.
        gap = np.diff(np.array(code.levels)).max()
        limit = max(gap / 2, code.levels[0], 1 + code.levels[0] if code.levels[0] < 0 else 0.0)
        assert float((values - matrix).abs().max() / matrix.abs().max()) <= limit + 1e-9


@pytest.mark.parametrize("states", FORMATS)
@pytest.mark.parametrize("moment", [0, 1])
def test_every_code_stands_for_its_level(states: str, moment: int) -> None:
    """Decoding and encoding with the same scales changes no code; packing neither, of any number of them."""
    code = FORMATS[states][moment]
    every = torch.arange(len(code.levels), dtype=torch.uint8)
    for scale in (1.0, 3e-20, 7.25):
        scales = torch.full((len(every),), scale, dtype=torch.float32)
        values = code.decode(every, scales)
        assert torch.equal(values, torch.tensor(code.levels, dtype=torch.float32) * scale)
        assert torch.equal(code.encode(values, scales), every)
    for count in (0, 1, 7, len(every)):
        assert torch.equal(code.unpack(code.pack(every[:count]), count), every[:count])
        assert code.pack(every[:count]).numel() == code.packed(count)


def test_zeros_and_what_is_no_number() -> None:
    for code in itertools.chain(*FORMATS.values()):
        zeros = torch.zeros(4, 256)
        zeros[1, 3] = 2.0
        values = coded(code, zeros)[1]
        assert torch.isfinite(values).all() and values[1, 3] == 2.0 and values[0].eq(0).all()
        for bad in (float("inf"), float("nan"), -float("inf")):
            matrix = torch.ones(4, 256)
            matrix[2, 5] = bad
            codes = coded(code, matrix)[0]
            assert int(codes.max()) < len(code.levels)  # packing never touches a neighbour


def test_bytes_of_both_moments() -> None:
    """At most 1.1 a parameter in 4 bits."""
    for states, limit in (("int4", 1.1), ("int8", 2.2)):
        a, b = 512, 1024
        nbytes = 0
        for code in FORMATS[states]:
            nbytes += code.packed(a * b) + 4 * scales_of(code, whole((1, a, b))).count
        assert limit - 0.2 < nbytes / (a * b) <= limit


def test_rank_1_is_better_than_blocks_where_rows_or_columns_stand_out() -> None:
    """The error of 1 / √v, which updates are multiplied by. A block is spoilt by one heavy column, and keeps a heavy
    row apart; rank 1 keeps both apart."""
    draws, rank_1 = torch.Generator().manual_seed(0), FORMATS["int4"][1]
    plain = torch.rand(256, 512, generator=draws, dtype=torch.float64).add(0.5)
    rows, columns = plain.clone(), plain.clone()
    rows[::37] *= 1e4
    columns[:, ::41] *= 1e4
    errors = {
        (name, kind): float((coded(code, v)[1].rsqrt() / v.rsqrt() - 1).abs().mean())
        for name, code in (("rank 1", rank_1), ("blocks", Code(rank_1.bits, rank_1.levels, 128)))
        for kind, v in (("rows", rows), ("columns", columns))
    }
    assert errors["rank 1", "columns"] < 0.1 * errors["blocks", "columns"]
    assert errors["rank 1", "rows"] < 1.2 * errors["blocks", "rows"] < 0.05


@pytest.mark.parametrize("states", FORMATS)
@pytest.mark.parametrize("moment", [0, 1])
@pytest.mark.parametrize("seed", range(3))
def test_parts_have_the_scales_of_the_whole(states: str, moment: int, seed: int) -> None:
    """Cut along any dim, and each slice into runs: with the largest of what they find, all have the whole's codes."""
    code, draws = FORMATS[states][moment], torch.Generator().manual_seed(seed)
    shape = (2, 6, 300)
    values = torch.randn(shape, generator=draws, dtype=torch.float64)
    held = scales_of(code, whole(shape))
    scales = torch.zeros(held.count, dtype=torch.float64)
    held.raise_to(scales, values.view(-1))
    expected = held.spread(scales).view(shape)
    for dim, cuts in ((0, 2), (1, 3), (2, 2), (2, 3)):
        size = shape[dim] // cuts
        for cut in range(cuts):
            part, spread = values.narrow(dim, cut * size, size), expected.narrow(dim, cut * size, size)
            offsets = tuple(cut * size if d == dim else 0 for d in range(3))
            borders = [0, *sorted(torch.randint(1, part.numel(), (3,), generator=draws).tolist()), part.numel()]
            for start, stop in itertools.pairwise(borders):
                if start == stop:
                    continue
                mine = scales_of(code, ElementRun(shape, tuple(part.shape), offsets, start, stop))  # type: ignore[arg-type]
                own = torch.zeros(mine.count, dtype=torch.float64)
                mine.raise_to(own, part.reshape(-1)[start:stop])
                here = mine.spread(own)
                assert here.shape == (stop - start,) and (here <= spread.reshape(-1)[start:stop]).all()
                if start == 0 and stop == part.numel() and dim == 0:
                    assert torch.equal(here, spread.reshape(-1))
